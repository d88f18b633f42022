"""LLVM vector code for functions that numba compiles: what its own loops do not keep in registers.

Memory is given by its address. Halves are the upper halves of float32 numbers: bfloat16, as 16-bit integers.
"""

from functools import cache

from llvmlite import binding, ir
from numba.core import cgutils

FLOAT, INT64, INT32, INT16, INT8 = ir.FloatType(), *(ir.IntType(bits) for bits in (64, 32, 16, 8))
BYTE = ir.IntType(8).as_pointer()
LINE = 64  # bytes that a cache fetches together


@cache
def lanes() -> int:
    """float32 numbers of a vector: 16 where 32 registers hold as many, else two registers of 4 or one of 8."""
    return 16 if binding.get_host_cpu_features().get("avx512f") else 8


@cache
def multiplies_pairs() -> bool:
    """Whether one instruction adds the products of two bfloat16 numbers to each of 16 sums."""
    return bool(binding.get_host_cpu_features().get("avx512bf16"))


def vector(element, count: int | None = None):
    return ir.VectorType(element, count or lanes())


class _BFloat(ir.Type):
    """What llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


_BFLOAT = _BFloat()


class Code:
    """Vector instructions at the end of a builder's block."""

    def __init__(self, builder):
        self.builder = builder

    def shift(self, address, index, width: int):
        """address + index * width bytes."""
        if isinstance(index, int):
            index = INT64(index)
        return self.builder.add(address, self.builder.mul(index, INT64(width)))

    def integer(self, address):
        return self.builder.load(self.at(INT64, address))

    def number(self, address):
        """One float32."""
        return self.builder.load(self.at(FLOAT, address), align=4)

    def load(self, address, count: int | None = None):
        return self.builder.load(self.at(vector(FLOAT, count), address), align=4)

    def load_halves(self, address, count: int):
        return self.builder.load(self.at(vector(INT16, count), address), align=2)

    def load_first_halves(self, address, number, count: int):
        """The first `number` of them, zeros behind; what lies there is not read."""
        kind, to = vector(INT16, count), vector(INT16, count).as_pointer()
        steps = ir.Constant(kind, list(range(count)))
        mask = self.builder.icmp_unsigned("<", steps, self.splat(self.builder.trunc(number, INT16), count))
        name = f"llvm.masked.load.v{count}i16.p0"
        function = ir.FunctionType(kind, [to, INT32, mask.type, kind])
        function = cgutils.get_or_insert_function(self.builder.module, function, name)
        return self.builder.call(function, [self.at(kind, address), INT32(2), mask, ir.Constant(kind, [0] * count)])

    def float8(self, address, count: int):
        """float32 numbers of e4m3 ones there, / 256: as float16 the same bits have an exponent that is 8 less."""
        signed = self.builder.load(self.at(vector(INT8, count), address), align=1)
        wide = self.builder.sext(signed, vector(INT16, count))  # the sign is in bit 8, too
        bits = self.builder.shl(wide, ir.Constant(wide.type, [7] * count))
        bits = self.builder.and_(bits, ir.Constant(wide.type, [0xBF80] * count))
        return self.builder.fpext(self.builder.bitcast(bits, vector(ir.HalfType(), count)), vector(FLOAT, count))

    def widen(self, halves):
        """float32 numbers of their upper halves."""
        return self._upper(self.builder.zext(halves, vector(INT32, halves.type.count)))

    def widen_even(self, halves):
        """Of numbers 0, 2, ..."""
        return self._upper(self.builder.bitcast(halves, vector(INT32, halves.type.count // 2)))

    def widen_odd(self, halves):
        """Of numbers 1, 3, ..."""
        pairs = self.builder.bitcast(halves, vector(INT32, halves.type.count // 2))
        upper = self.builder.and_(pairs, ir.Constant(pairs.type, [0xFFFF0000] * pairs.type.count))
        return self.builder.bitcast(upper, vector(FLOAT, pairs.type.count))

    def _upper(self, words):
        bits = self.builder.shl(words, ir.Constant(words.type, [16] * words.type.count))
        return self.builder.bitcast(bits, vector(FLOAT, words.type.count))

    def narrow(self, floats):
        """Rounded to bfloat16; needs `multiplies_pairs()`."""
        count = floats.type.count
        return self.builder.bitcast(self.builder.fptrunc(floats, vector(_BFLOAT, count)), vector(INT16, count))

    def narrow_pairs(self, a, b):
        """Numbers of a and b in turn, rounded to bfloat16, of two the larger one; for finite ones.

        Four instructions, where AVX-512's own for it takes as long as six and leaves the numbers in another order.
        """
        words, count = vector(INT32, a.type.count), 2 * a.type.count
        up, half = (ir.Constant(words, [value] * words.count) for value in (0x8000, 16))
        rounded = (self.builder.add(self.builder.bitcast(numbers, words), up) for numbers in (a, b))
        low, high = rounded
        low, high = (self.builder.bitcast(part, vector(INT16, count)) for part in (self.builder.lshr(low, half), high))
        return self.pick(low, high, [i + count * (i % 2) for i in range(count)])

    def store_halves(self, halves, address) -> None:
        self.builder.store(halves, self.at(halves.type, address), align=2)

    def store(self, value, address) -> None:
        self.builder.store(value, self.at(value.type, address), align=4)

    def splat(self, one, count: int):
        """One number in all lanes."""
        alone = self.builder.insert_element(ir.Constant(vector(one.type, count), ir.Undefined), one, INT32(0))
        return self.pick(alone, alone, [0] * count)

    def multiply_add(self, a, b, c):
        product = self.builder.fmul(a, b, flags=("contract",))
        return self.builder.fadd(product, c, flags=("contract",))

    def larger(self, a, b):
        """b where either is no number."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def add_pairs(self, a, b, c):
        """c + the products of pairs of a's and b's bfloat16 numbers, side by side; needs `multiplies_pairs()`."""
        kind, sums = vector(_BFLOAT, 2 * lanes()), vector(FLOAT)
        function = ir.FunctionType(sums, [sums, kind, kind])
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes()}"
        function = cgutils.get_or_insert_function(self.builder.module, function, name)
        return self.builder.call(function, [c, self.builder.bitcast(a, kind), self.builder.bitcast(b, kind)])

    def pick(self, a, b, numbers: list[int]):
        """These lanes of a, and of b behind them."""
        return self.builder.shuffle_vector(a, b, ir.Constant(vector(INT32, len(numbers)), numbers))

    def totals(self, vectors: list):
        """A vector of the sums of each vector's lanes; 2, 4, .. vectors, up to as many as there are lanes."""
        each = lanes()
        while each > 1:
            each //= 2
            if len(vectors) == 1:
                vectors = [self._halve(vectors[0], vectors[0], each)]
            else:
                vectors = [self._halve(a, b, each) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        return vectors[0]

    def _halve(self, a, b, half: int):
        """The groups of 2 * half lanes of a, and then of b if it is another, become groups of half as many."""
        groups = range(0, a.type.count * (1 if a is b else 2), 2 * half)
        low = [group + lane for group in groups for lane in range(half)]
        return self.builder.fadd(self.pick(a, b, low), self.pick(a, b, [lane + half for lane in low]))

    def prefetch(self, address, writes: bool = False) -> None:
        """The line there begins to come nearer."""
        kind = ir.FunctionType(ir.VoidType(), [BYTE, INT32, INT32, INT32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(function, [self.builder.inttoptr(address, BYTE), INT32(int(writes)), INT32(2), INT32(1)])

    def prefetch_all(self, address, size) -> None:
        """`size` bytes begin to come nearer."""
        with cgutils.for_range_slice(self.builder, INT64(0), size, INT64(LINE)) as (offset, _):
            self.prefetch(self.builder.add(address, offset))

    def zeros(self, count: int) -> list:
        """Places of vectors of sums, which become registers."""
        zero = ir.Constant(vector(FLOAT), [0.0] * lanes())
        places = [cgutils.alloca_once(self.builder, zero.type) for _ in range(count)]
        for place in places:
            self.builder.store(zero, place)
        return places

    def at(self, kind, address):
        return self.builder.inttoptr(address, kind.as_pointer())
