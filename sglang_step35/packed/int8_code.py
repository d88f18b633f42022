"""LLVM vector instructions whose lanes are rows of weights."""

from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils

from sglang_step35.vector_code import FLOAT, INT32, INT64

BYTE = ir.IntType(8)


class Code:
    """At the end of a builder's block, for so many lanes."""

    def __init__(self, builder, lanes: int):
        self.builder, self.lanes = builder, lanes

    def all(self, kind, value):
        return ir.Constant(ir.VectorType(kind, self.lanes), [value] * self.lanes)

    def load(self, kind, address, offset: int = 0):
        return self.builder.load(self._at(kind, address, offset), align=1)

    def store(self, vector, address, offset: int) -> None:
        self.builder.store(vector, self._at(vector.type, address, offset), align=4)

    def prefetch(self, address, offset: int) -> None:
        """Into the core's second cache: the first is too small for what the next rows need."""
        kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT32, INT32, INT32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(function, [self._at(BYTE, address, offset), INT32(0), INT32(2), INT32(1)])

    def gather(self, kind, width: int, addresses: Sequence, offset: int):
        """`width` numbers of every lane: an equal share of the vector from each address."""
        share = ir.VectorType(kind, width * self.lanes // len(addresses))
        found = [self.load(share, address, offset) for address in addresses]
        while len(found) > 1:
            found = [self._join(*pair) for pair in zip(found[::2], found[1::2], strict=True)]
        return found[0]

    def halves(self, addresses: Sequence, offset: int):
        """A float16 of every lane, as float32."""
        return self.builder.fpext(self.gather(ir.HalfType(), 1, addresses, offset), ir.VectorType(FLOAT, self.lanes))

    def splat(self, kind, address, offset: int):
        """One number in all lanes."""
        return self.spread(self.load(kind, address, offset), self.lanes)

    def spread(self, number, count: int):
        nothing = ir.Constant(ir.VectorType(number.type, count), ir.Undefined)
        one = self.builder.insert_element(nothing, number, INT32(0))
        return self.builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(INT32, count), [0] * count))

    def pick(self, vector, lanes: Sequence[int]):
        order = ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes))
        return self.builder.shuffle_vector(vector, vector, order)

    def reduced(self, name: str, vector):
        """One number of all lanes of a vector of int32."""
        kind = ir.FunctionType(INT32, [vector.type])
        name = f"llvm.vector.reduce.{name}.v{vector.type.count}i32"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [vector])

    def mask(self, vector, bits: int):
        """These bits of every byte."""
        return self.builder.and_(vector, ir.Constant(vector.type, [bits] * vector.type.count))

    def shift(self, vector, count: int):
        """Every byte to the right, or by a negative count to the left."""
        by = ir.Constant(vector.type, [abs(count)] * vector.type.count)
        return self.builder.lshr(vector, by) if count >= 0 else self.builder.shl(vector, by)

    def dot(self, sums, weights, activations):
        """Of 4 unsigned weights of each lane and 4 signed activations, added to sums."""
        kind = ir.VectorType(INT32, self.lanes)
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return self.builder.call(function, [sums, self.builder.bitcast(weights, kind), activations])

    def multiply_add(self, a, b, c):
        product = self.builder.fmul(a, b, flags=("contract",))
        return self.builder.fadd(product, c, flags=("contract",))

    def _join(self, a, b):
        count = 2 * a.type.count
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, count), list(range(count))))

    def _at(self, kind, address, offset: int):
        return self.builder.inttoptr(self.builder.add(address, INT64(offset)), kind.as_pointer())
