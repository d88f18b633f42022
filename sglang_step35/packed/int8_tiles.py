"""Rows of int8 activations by interleaved rows of weights, as LLVM vector code: one instruction for 4 columns.

A vector's lanes are rows of weights, eight of each of two places that share no page of memory: prefetching serves two
streams better than one. vpdpbusd adds to each lane the products of its 4 unsigned weights with the same 4 signed
activations. What was read and unpacked of the weights serves up to MOST rows of activations, whose sums stay in
registers. Memory is given by its address.
"""

from llvmlite import binding
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sglang_step35.packed.int8_code import FLOAT, INT32, INT64, Code
from sglang_step35.packed.int8_formats import COLUMNS, FORMATS, Format

MOST = 8  # rows of activations at once: their sums and dots take half of the registers
LANES = 8  # rows of weights of one place
# A row's record of 32 columns: as many int8, their scale (float32), and for each part where a sum of products starts:
# int32 -offset times the sum of its columns, or float32 -scale times it where the weights have minima.
SCALE, START, RECORD = COLUMNS, COLUMNS + 4, COLUMNS + 12


def supported() -> bool:
    """Whether this CPU has the instructions."""
    features = binding.get_host_cpu_features()
    return all(features.get(name) for name in ("avx512f", "avx512bw", "avx512vl", "avx512vnni"))


@intrinsic(prefer_literal=True)
def multiply_tile(typing, kind, count, first, second, row, blocks, places, sums):
    """sums [count, LANES or 2 LANES] float32 = `count` rows of activations times 8 or 16 rows of weights.

    kind: literal, of FORMATS. first, second: addresses of 8 interleaved rows of weights, second 0 for none. row: bytes
    of one. blocks: of a row. places [count]: addresses of records.
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        _, count, first, second, row, blocks, places, sums = arguments
        chosen = FORMATS[kind.literal_value]
        end, never = (builder.append_basic_block(name) for name in ("end", "never"))
        both = builder.zext(builder.icmp_signed("!=", second, INT64(0)), INT64)
        switch = builder.switch(builder.add(count, builder.mul(both, INT64(MOST))), never)
        for streams in ((first,), (first, second)):
            for rows in range(1, MOST + 1):
                block = builder.append_basic_block(f"rows_{rows}")
                switch.add_case(INT64(rows + (len(streams) - 1) * MOST), block)
                builder.position_at_end(block)
                apart = builder.mul(row, INT64(chosen.rows))
                starts = [builder.add(s, builder.mul(apart, INT64(i))) for s in streams for i in range(LANES // chosen.rows)]
                _tile(Code(builder, LANES * len(streams)), chosen, rows, starts, blocks, places, sums)
                builder.branch(end)
        builder.position_at_end(never)
        builder.unreachable()
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 7), generate


def _tile(code: Code, chosen: Format, rows: int, starts: list, blocks, places, sums) -> None:
    builder = code.builder
    inputs = [code.load(INT64, places, 8 * r) for r in range(rows)]
    zero = code.all(FLOAT, 0.0)
    totals = [cgutils.alloca_once_value(builder, zero) for _ in range(rows)]
    for place in totals:
        builder.store(zero, place)
    with cgutils.for_range(builder, blocks) as outer:
        here = [builder.add(start, builder.mul(outer.index, INT64(chosen.size))) for start in starts]
        with cgutils.for_range(builder, INT64(chosen.groups)) as inner:
            number = builder.add(builder.mul(outer.index, INT64(chosen.groups)), inner.index)
            offset = builder.mul(number, INT64(RECORD))
            _group(code, chosen, here, inner.index, [builder.add(x, offset) for x in inputs], totals)
    for r, place in enumerate(totals):
        code.store(builder.load(place), sums, 4 * code.lanes * r)


def _group(code: Code, chosen: Format, here: list, group, records: list, totals: list) -> None:
    """32 columns are added."""
    builder = code.builder
    parts, minimum = chosen.unpack(code, here, group)
    scaled: list = []
    for number, (scale, columns) in enumerate(parts):
        dots = [code.splat(INT32, x, START + 4 * number) if chosen.offset else code.all(INT32, 0) for x in records]
        for column, weights in columns:
            dots = [code.dot(d, weights, code.splat(INT32, x, column)) for d, x in zip(dots, records, strict=True)]
        wide = [builder.sitofp(dot, scale.type) for dot in dots]
        if number == 0:
            scaled = [builder.fmul(value, scale) for value in wide]
        else:
            scaled = [code.multiply_add(value, scale, sum) for value, sum in zip(wide, scaled, strict=True)]
    for x, value, place in zip(records, scaled, totals, strict=True):
        total = code.multiply_add(value, code.splat(FLOAT, x, SCALE), builder.load(place))
        if minimum is not None:
            total = code.multiply_add(minimum, code.splat(FLOAT, x, START), total)
        builder.store(total, place)
