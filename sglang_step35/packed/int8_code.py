"""LLVM vector instructions whose lanes are rows of weights."""

from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils

from sglang_step35.vector_code import FLOAT, INT32, INT64, Code

BYTE = ir.IntType(8)


class LaneCode(Code):
    """At the end of a builder's block, for so many lanes."""

    def __init__(self, builder, lanes: int):
        super().__init__(builder)
        self.lanes = lanes

    def all(self, kind, value):
        return ir.Constant(ir.VectorType(kind, self.lanes), [value] * self.lanes)

    def read(self, kind, address, offset: int = 0):
        return self.builder.load(self.behind(kind, address, offset), align=1)

    def write(self, vector, address, offset: int) -> None:
        self.builder.store(vector, self.behind(vector.type, address, offset), align=4)

    def gather(self, kind, width: int, addresses: Sequence, offset: int):
        """`width` numbers of every lane: an equal share of the vector from each address."""
        share = ir.VectorType(kind, width * self.lanes // len(addresses))
        found = [self.read(share, address, offset) for address in addresses]
        while len(found) > 1:
            found = [self._join(*pair) for pair in zip(found[::2], found[1::2], strict=True)]
        return found[0]

    def halves(self, addresses: Sequence, offset: int):
        """A float16 of every lane, as float32."""
        return self.builder.fpext(self.gather(ir.HalfType(), 1, addresses, offset), ir.VectorType(FLOAT, self.lanes))

    def in_all(self, kind, address, offset: int):
        """One number in all lanes."""
        return self.splat(self.read(kind, address, offset), self.lanes)

    def some(self, vector, lanes: Sequence[int]):
        """These lanes."""
        return self.pick(vector, vector, list(lanes))

    def reduced(self, name: str, vector):
        """One number of all lanes of a vector of int32."""
        kind = ir.FunctionType(INT32, [vector.type])
        name = f"llvm.vector.reduce.{name}.v{vector.type.count}i32"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [vector])

    def mask(self, vector, bits: int):
        """These bits of every byte."""
        return self.builder.and_(vector, ir.Constant(vector.type, [bits] * vector.type.count))

    def shift_bytes(self, vector, count: int):
        """Every byte to the right, or by a negative count to the left."""
        by = ir.Constant(vector.type, [abs(count)] * vector.type.count)
        return self.builder.lshr(vector, by) if count >= 0 else self.builder.shl(vector, by)

    def dot(self, sums, weights, activations):
        """Of 4 unsigned weights of each lane and 4 signed activations, added to sums."""
        kind = ir.VectorType(INT32, self.lanes)
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return self.builder.call(function, [sums, self.builder.bitcast(weights, kind), activations])

    def _join(self, a, b):
        return self.pick(a, b, list(range(2 * a.type.count)))

    def behind(self, kind, address, offset: int):
        """A pointer to what lies so many bytes behind an address."""
        return self.at(kind, self.builder.add(address, INT64(offset)))
