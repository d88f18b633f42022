"""prototype"""

from functools import cache

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

MOST = 8
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


class Code:
    def __init__(self, builder, groups):
        self.builder, self.groups = builder, groups
        self.lanes = 8 * groups

    def at(self, kind, address, offset=0):
        if offset:
            address = self.builder.add(address, I64(offset))
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, kind, address, offset=0):
        return self.builder.load(self.at(kind, address, offset), align=1)

    def pair(self, element, count, addresses, offset):
        """vector of count per group"""
        parts = [self.load(ir.VectorType(element, count), a, offset) for a in addresses]
        if len(parts) == 1:
            return parts[0]
        order = ir.Constant(ir.VectorType(I32, 2 * count), list(range(2 * count)))
        return self.builder.shuffle_vector(parts[0], parts[1], order)

    def splat(self, kind, address, offset=0):
        one = self.load(kind, address, offset)
        vec = ir.VectorType(kind, self.lanes)
        und = ir.Constant(vec, ir.Undefined)
        one = self.builder.insert_element(und, one, I32(0))
        return self.builder.shuffle_vector(one, und, ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes))

    def const(self, element, count, value):
        return ir.Constant(ir.VectorType(element, count), [value] * count)

    def dot(self, sums, weights, acts):
        kind = ir.VectorType(I32, self.lanes)
        name = f"llvm.x86.avx512.vpdpbusd.{self.lanes * 32}"
        fn = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return self.builder.call(fn, [sums, self.builder.bitcast(weights, kind), acts])

    def multiply_add(self, a, b, c):
        product = self.builder.fmul(a, b, flags=("contract",))
        return self.builder.fadd(product, c, flags=("contract",))


def q4_0_weights(code, addresses):
    b, count = code.builder, 32 * code.groups
    for l in range(4):
        packed = code.pair(I8, 32, addresses, 16 + 32 * l)
        yield 4 * l, b.and_(packed, code.const(I8, count, 15))
        yield 4 * l + 16, b.lshr(packed, code.const(I8, count, 4))


def q8_0_weights(code, addresses):
    for l in range(8):
        packed = code.pair(I8, 32, addresses, 16 + 32 * l)
        yield 4 * l, code.builder.xor(packed, code.const(I8, 32 * code.groups, -128))


FORMATS = {2: (q4_0_weights, 144), 8: (q8_0_weights, 272)}


def tile(code, kind, rows, addresses, blocks, acts, out, pitch):
    """addresses of the groups' first blocks; out: addresses of the first row's results of each group"""
    weights_of, size = FORMATS[kind]
    b = code.builder
    zero = code.const(F32, code.lanes, 0.0)
    sums = [cgutils.alloca_once_value(b, zero) for _ in range(rows)]
    for s in sums:
        b.store(zero, s)
    with cgutils.for_range(b, blocks) as loop:
        here = [b.add(a, b.mul(loop.index, I64(size))) for a in addresses]
        x = b.add(acts, b.mul(loop.index, I64(40 * rows)))
        dots = [code.splat(I32, x, rows * 36 + 4 * r) for r in range(rows)]
        for column, w in weights_of(code, here):
            for r in range(rows):
                dots[r] = code.dot(dots[r], w, code.splat(I32, x, 32 * r + column))
        scale = b.fpext(code.pair(ir.HalfType(), 8, here, 0), ir.VectorType(F32, code.lanes))
        for r in range(rows):
            factor = b.fmul(scale, code.splat(F32, x, rows * 32 + 4 * r))
            value = b.sitofp(dots[r], ir.VectorType(F32, code.lanes))
            b.store(code.multiply_add(value, factor, b.load(sums[r])), sums[r])
    for r in range(rows):
        found = b.load(sums[r])
        row = b.mul(I64(r), pitch)
        for g in range(code.groups):
            order = ir.Constant(ir.VectorType(I32, 8), list(range(8 * g, 8 * g + 8)))
            part = b.shuffle_vector(found, found, order)
            b.store(part, code.at(part.type, b.add(out[g], row)), align=4)


@intrinsic(prefer_literal=True)
def run_tile(typing, kind, rows, a, c, blocks, acts, out_a, out_c, pitch):
    """c = 0: one group"""
    number = kind.literal_value

    def generate(context, builder, signature, arguments):
        _, rows, a, c, blocks, acts, out_a, out_c, pitch = arguments
        end = builder.append_basic_block("end")
        bad = builder.append_basic_block("bad")
        both = builder.icmp_signed("!=", c, I64(0))
        switch = builder.switch(builder.add(rows, builder.mul(builder.zext(both, I64), I64(MOST))), bad)
        for groups in (1, 2):
            for r in range(1, MOST + 1):
                block = builder.append_basic_block(f"tile{groups}x{r}")
                switch.add_case(I64(r + (groups - 1) * MOST), block)
                builder.position_at_end(block)
                tile(Code(builder, groups), number, r, [a, c][:groups], blocks, acts, [out_a, out_c][:groups], pitch)
                builder.branch(end)
        builder.position_at_end(bad)
        builder.unreachable()
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 8), generate
