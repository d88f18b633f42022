"""Query rows by keys where they lie in a pool, as LLVM vector code: what numba's loops do not keep in registers.

A tile of ROWS query rows and some keys, or numbers of their values, has its sums in registers, so that each vector that
is read of a key or value serves ROWS rows and each of a row several keys. A Zen 4 core multiplies at 90 (scores) and
108 (mix) GFLOP/s so, of 115 it can.

Letters: R query rows, a multiple of ROWS, D head size, a multiple of `lanes()`, K keys, a multiple of KEYS_AT_ONCE.

`stored` is how pools hold numbers: np.float32, or np.uint16, the upper half of a float32 (bfloat16). All
else is float32. Memory is given by its address.
"""

from functools import cache

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS, KEYS_AT_ONCE = 4, 4
LINE = 64  # bytes that a cache fetches together
_FLOAT, _INT64, _INT32, _BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8).as_pointer()
_STORED = {types.float32: _FLOAT, types.uint16: ir.IntType(16)}
_WIDTH = {types.float32: 4, types.uint16: 2}


@cache
def lanes() -> int:
    """float32 numbers of a vector: 16 where 32 registers hold as many, else two registers of 4 or one of 8."""
    return 16 if binding.get_host_cpu_features().get("avx512f") else 8


def _vector(element, count: int | None = None):
    return ir.VectorType(element, count or lanes())


class _Code:
    """Vector instructions at the end of a builder's block."""

    def __init__(self, builder, stored=types.float32):
        self.builder, self.stored = builder, stored

    def shift(self, address, index, width: int):
        """address + index * width bytes."""
        if isinstance(index, int):
            index = _INT64(index)
        return self.builder.add(address, self.builder.mul(index, _INT64(width)))

    def integer(self, address):
        return self.builder.load(self._at(_INT64, address))

    def load(self, address):
        return self.builder.load(self._at(_vector(_FLOAT), address), align=4)

    def load_stored(self, address):
        """A vector of a pool's numbers, widened."""
        found = self.builder.load(self._at(_vector(_STORED[self.stored]), address), align=_WIDTH[self.stored])
        if self.stored == types.float32:
            return found
        bits = self.builder.zext(found, _vector(_INT32))
        return self.builder.bitcast(self.builder.shl(bits, ir.Constant(bits.type, [16] * lanes())), _vector(_FLOAT))

    def store(self, vector, address) -> None:
        self.builder.store(vector, self._at(vector.type, address), align=4)

    def splat(self, address):
        """One number in all lanes."""
        one = self.builder.insert_element(
            ir.Constant(_vector(_FLOAT), ir.Undefined), self.builder.load(self._at(_FLOAT, address)), _INT32(0)
        )
        return self.pick(one, one, [0] * lanes())

    def multiply_add(self, a, b, c):
        product = self.builder.fmul(a, b, flags=("contract",))
        return self.builder.fadd(product, c, flags=("contract",))

    def pick(self, a, b, numbers: list[int]):
        """These lanes of a, and of b behind them."""
        return self.builder.shuffle_vector(a, b, ir.Constant(_vector(_INT32, len(numbers)), numbers))

    def totals(self, vectors: list):
        """A vector of the sums of each vector's lanes, from 2 up to as many as there are lanes."""
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

    def prefetch(self, address, size) -> None:
        """`size` bytes begin to come nearer."""
        builder = self.builder
        kind = ir.FunctionType(ir.VoidType(), [_BYTE, _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        with cgutils.for_range_slice(builder, _INT64(0), size, _INT64(LINE)) as (offset, _):
            place = builder.inttoptr(builder.add(address, offset), _BYTE)
            builder.call(function, [place, _INT32(0), _INT32(2), _INT32(1)])

    def at_number(self, address):
        return self._at(_FLOAT, address)

    def _at(self, kind, address):
        return self.builder.inttoptr(address, kind.as_pointer())


@intrinsic
def scores(typing, stored, q, rows, size, places, count, out, pitch, later, ahead):
    """out [R, pitch] of its first K numbers = q [R, D] times keys of type `stored` at addresses places [K].

    later [ahead]: addresses of D numbers that are wanted next.
    """

    def generate(context, builder, signature, arguments):
        _, q, rows, size, places, count, out, pitch, later, ahead = arguments
        code = _Code(builder, stored.dtype)
        step = _INT64(lanes() // ROWS)
        with cgutils.for_range_slice(builder, _INT64(0), count, step) as (key, _):
            end = builder.add(key, step)
            share = [builder.sdiv(builder.mul(ahead, edge), count) for edge in (key, end)]
            with cgutils.for_range_slice(builder, *share, _INT64(1)) as (j, _):
                code.prefetch(code.integer(code.shift(later, j, 8)), builder.mul(size, _INT64(_WIDTH[code.stored])))
            with cgutils.for_range_slice(builder, _INT64(0), rows, _INT64(ROWS)) as (row, _):
                _score_tile(code, row, key, q, size, places, out, pitch)
        return context.get_dummy_value()

    return types.void(stored, *[types.int64] * 9), generate


def _score_tile(code: _Code, row, key, q, size, places, out, pitch) -> None:
    builder, keys = code.builder, lanes() // ROWS
    places = code.shift(places, key, 8)
    places = [code.integer(code.shift(places, j, 8)) for j in range(keys)]
    own = [code.shift(q, builder.mul(builder.add(row, _INT64(r)), size), 4) for r in range(ROWS)]
    zero = ir.Constant(_vector(_FLOAT), [0.0] * lanes())
    sums = [cgutils.alloca_once_value(builder, zero) for _ in range(ROWS * keys)]
    for place in sums:
        builder.store(zero, place)
    with cgutils.for_range_slice(builder, _INT64(0), size, _INT64(lanes())) as (d, _):
        wide = [code.load_stored(code.shift(place, d, _WIDTH[code.stored])) for place in places]
        for r in range(ROWS):
            x = code.load(code.shift(own[r], d, 4))
            for j in range(keys):
                place = sums[r * keys + j]
                builder.store(code.multiply_add(x, wide[j], builder.load(place)), place)
    found = code.totals([builder.load(place) for place in sums])
    for r in range(ROWS):
        part = code.pick(found, found, list(range(r * keys, (r + 1) * keys)))
        to = builder.add(builder.mul(builder.add(row, _INT64(r)), pitch), key)
        code.store(part, code.shift(out, to, 4))


@intrinsic
def mix(typing, stored, weights, pitch, rows, size, places, count, sums):
    """sums [R, D] += weights [R, pitch] of K columns times values of type `stored` at addresses places [K]."""

    def generate(context, builder, signature, arguments):
        _, weights, pitch, rows, size, places, count, sums = arguments
        code, most = _Code(builder, stored.dtype), lanes() // ROWS
        wide = builder.mul(builder.sdiv(size, _INT64(most * lanes())), _INT64(most * lanes()))
        with cgutils.for_range_slice(builder, _INT64(0), rows, _INT64(ROWS)) as (row, _):
            for vectors, first, end in ((most, _INT64(0), wide), (1, wide, size)):
                with cgutils.for_range_slice(builder, first, end, _INT64(vectors * lanes())) as (d, _):
                    _mix_tile(code, row, d, vectors, weights, pitch, size, places, count, sums)
        return context.get_dummy_value()

    return types.void(stored, *[types.int64] * 7), generate


def _mix_tile(code: _Code, row, d, vectors: int, weights, pitch, size, places, count, sums) -> None:
    builder, width = code.builder, _WIDTH[code.stored]
    rows = [builder.add(row, _INT64(r)) for r in range(ROWS)]
    own = [code.shift(weights, builder.mul(r, pitch), 4) for r in rows]
    to = [code.shift(sums, builder.add(builder.mul(r, size), d), 4) for r in rows]
    to = [[code.shift(address, i * lanes(), 4) for i in range(vectors)] for address in to]
    tile = [[cgutils.alloca_once(builder, _vector(_FLOAT)) for _ in range(vectors)] for _ in rows]
    for r in range(ROWS):
        for place, address in zip(tile[r], to[r], strict=True):
            builder.store(code.load(address), place)
    with cgutils.for_range(builder, count) as loop:
        value = code.shift(code.integer(code.shift(places, loop.index, 8)), d, width)
        wide = [code.load_stored(code.shift(value, i * lanes(), width)) for i in range(vectors)]
        for r in range(ROWS):
            weight = code.splat(code.shift(own[r], loop.index, 4))
            for place, v in zip(tile[r], wide, strict=True):
                builder.store(code.multiply_add(weight, v, builder.load(place)), place)
    for r in range(ROWS):
        for place, address in zip(tile[r], to[r], strict=True):
            code.store(builder.load(place), address)


@intrinsic
def pointer(typing, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], _BYTE)

    return types.voidptr(types.int64), generate


@intrinsic
def add_one(typing, address):
    """The int64 there as it was; it grows by one, whatever other threads do."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", place, _INT64(1), "acq_rel")

    return types.int64(types.int64), generate
