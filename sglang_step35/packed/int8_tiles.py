"""Rows of int8 activations by interleaved rows of weights, as LLVM vector code: one instruction for 4 columns.

A vector's lanes are rows of weights, eight of each of two places that share no page of memory: prefetching serves two
streams better than one. vpdpbusd adds to each lane the products of its 4 unsigned weights with the same 4 signed
activations. What was read and unpacked of the weights serves up to MOST rows of activations, whose sums stay in
registers. Memory is given by its address.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sglang_step35.packed.int8_code import BYTE, LaneCode
from sglang_step35.packed.int8_formats import COLUMNS, FORMATS, Format
from sglang_step35.vector_code import FLOAT, INT32, INT64

MOST = 8  # rows of activations at once: their sums and dots take half of the registers
LANES = 8  # rows of weights of one place
# A row's record of 32 columns: as many int8, their scale (float32), and for each part where a sum of products starts:
# int32 -offset times the sum of its columns, or float32 -scale times it where the weights have minima.
SCALE, START, RECORD = COLUMNS, COLUMNS + 4, COLUMNS + 12
LINE = 64  # bytes that a cache fetches together
TO_INTEGER = 3.0 * 2**22  # added to a small float32: the lowest bits are those of the nearest integer


@intrinsic(prefer_literal=True)
def multiply_tile(typing, kind, count, first, second, row, blocks, places, results, left, right):
    """`count` rows of activations times 8 or 16 rows of weights, of a literal kind of FORMATS.

    first, second: addresses of LANES interleaved rows, second 0 for none. row: bytes of one. blocks: of a row. places
    [count]: addresses of a row's records. results [count]: addresses, to which LANES float32 of the first rows go
    `left` bytes behind, those of the second `right` bytes behind.
    """
    if not isinstance(kind, types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        _, count, first, second, row, blocks, places, results, left, right = arguments
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
                shifts = [builder.mul(apart, INT64(i)) for i in range(LANES // chosen.rows)]
                starts = [builder.add(stream, shift) for stream in streams for shift in shifts]
                code = LaneCode(builder, LANES * len(streams))
                totals = _tile(code, chosen, rows, starts, blocks, places, builder.mul(row, INT64(LANES)))
                _store(code, totals, results, (left, right))
                builder.branch(end)
        builder.position_at_end(never)
        builder.unreachable()
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 9), generate


def _tile(code: LaneCode, chosen: Format, rows: int, starts: list, blocks, places, ahead) -> list:
    """Vectors of the lanes' sums over all columns, one for each row of activations."""
    builder = code.builder
    inputs = [code.read(INT64, places, 8 * r) for r in range(rows)]
    zero = code.all(FLOAT, 0.0)
    totals = [cgutils.alloca_once_value(builder, zero) for _ in range(rows)]
    for place in totals:
        builder.store(zero, place)
    with cgutils.for_range(builder, blocks) as outer:
        here = [builder.add(start, builder.mul(outer.index, INT64(chosen.size))) for start in starts]
        with cgutils.for_range(builder, INT64(chosen.groups)) as inner:
            _prefetch(code, chosen, here, inner.index, ahead)
            number = builder.add(builder.mul(outer.index, INT64(chosen.groups)), inner.index)
            offset = builder.mul(number, INT64(RECORD))
            _group(code, chosen, here, inner.index, [builder.add(x, offset) for x in inputs], totals)
    return [builder.load(place) for place in totals]


def _prefetch(code: LaneCode, chosen: Format, here: list, group, ahead) -> None:
    """What is read at the same place of the next rows."""
    size = chosen.size // chosen.groups
    start = code.builder.add(code.builder.mul(group, INT64(size)), ahead)
    for block in here:
        for offset in range(0, size, LINE):
            code.prefetch(code.builder.add(code.builder.add(block, start), INT64(offset)))


def _store(code: LaneCode, totals: list, results, offsets: tuple) -> None:
    for r, total in enumerate(totals):
        to = code.read(INT64, results, 8 * r)
        for stream in range(code.lanes // LANES):
            part = code.some(total, range(LANES * stream, LANES * (stream + 1)))
            code.write(part, code.builder.add(to, offsets[stream]), 0)


def _group(code: LaneCode, chosen: Format, here: list, group, records: list, totals: list) -> None:
    """32 columns are added to the totals."""
    builder = code.builder
    parts, minimum = chosen.unpack(code, here, group)
    scaled: list = []
    for number, (scale, columns) in enumerate(parts):
        dots = [code.in_all(INT32, x, START + 4 * number) if chosen.offset else code.all(INT32, 0) for x in records]
        for column, weights in columns:
            dots = [code.dot(d, weights, code.in_all(INT32, x, column)) for d, x in zip(dots, records, strict=True)]
        wide = [builder.sitofp(dot, scale.type) for dot in dots]
        if number == 0:
            scaled = [builder.fmul(value, scale) for value in wide]
        else:
            scaled = [code.multiply_add(value, scale, sum) for value, sum in zip(wide, scaled, strict=True)]
    for x, value, place in zip(records, scaled, totals, strict=True):
        total = code.multiply_add(value, code.in_all(FLOAT, x, SCALE), builder.load(place))
        if minimum is not None:
            total = code.multiply_add(minimum, code.in_all(FLOAT, x, START), total)
        builder.store(total, place)


@intrinsic
def quantise(typing, x, to, offset, parts):
    """The record at `to` of 32 float32 at x, for a format's offset and parts (1 or 2).

    A NaN or an infinity among them is its scale.
    """

    def generate(context, builder, signature, arguments):
        _, to, offset, parts = arguments
        code = LaneCode(builder, COLUMNS)
        values = code.read(ir.VectorType(FLOAT, COLUMNS), arguments[0])
        bits = builder.and_(builder.bitcast(values, ir.VectorType(INT32, COLUMNS)), code.all(INT32, 0x7FFFFFFF))
        largest = builder.bitcast(code.reduced("smax", bits), FLOAT)  # as integers: in the order of the numbers
        scale = builder.fdiv(largest, FLOAT(127))
        some = builder.fcmp_ordered(">", largest, FLOAT(0))
        factor = builder.select(some, builder.fdiv(FLOAT(127), largest), FLOAT(0))
        near = builder.fadd(builder.fmul(values, code.splat(factor, COLUMNS)), code.all(FLOAT, TO_INTEGER))
        codes = builder.trunc(builder.bitcast(near, bits.type), ir.VectorType(BYTE, COLUMNS))
        code.write(codes, to, 0)
        code.write(scale, to, SCALE)
        wide = builder.sext(codes, bits.type)
        halves = [code.reduced("add", code.some(wide, range(i, i + COLUMNS // 2))) for i in (0, COLUMNS // 2)]
        both = builder.add(*halves)
        first = builder.select(builder.icmp_signed("==", parts, INT64(1)), both, halves[0])
        minus = builder.neg(builder.trunc(offset, INT32))
        for_minima = builder.bitcast(builder.fmul(builder.fneg(scale), builder.sitofp(both, FLOAT)), INT32)
        start = builder.select(builder.icmp_signed("==", minus, INT32(0)), for_minima, builder.mul(minus, first))
        code.write(start, to, START)
        code.write(builder.mul(minus, halves[1]), to, START + 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate
