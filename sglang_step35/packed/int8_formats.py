"""What stands where in interleaved blocks, the library's and `two_bits.py`'s: read as unsigned weights, scales and
minima.

Learned from where `iqk_repack_tensor` puts each bit. A format's `unpack` takes the addresses of its interleaved rows'
blocks and which 32 columns of the block (int64), and gives (parts, minimum). A part is (scale, columns): float32 of
every lane and pairs of a column and a vector of the 4 weights that each lane has from there. minimum: float32 of every
lane, what is subtracted from scale times weight; None where that is scale times the format's offset.
"""

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from sglang_step35.packed.int8_code import BYTE, LaneCode
from sglang_step35.packed.two_bits import TWO_BITS
from sglang_step35.vector_code import FLOAT, INT32, INT64

COLUMNS = 32


def _q4_0(code: LaneCode, blocks: list, _group):
    """8 float16 scales, then 4 times 4 bytes of every row: columns i and i + 16 in the halves of byte i."""
    packed = [(4 * i, code.gather(BYTE, 4, blocks, 16 + 32 * i)) for i in range(4)]
    columns = [pair for i, both in packed for pair in ((i, code.mask(both, 15)), (i + 16, code.shift_bytes(both, 4)))]
    return [(code.halves(blocks, 0), columns)], None


def _q8_0(code: LaneCode, blocks: list, _group):
    """8 float16 scales, then 8 times 4 int8 of every row."""
    signed = [(4 * i, code.gather(BYTE, 4, blocks, 16 + 32 * i)) for i in range(8)]
    columns = [(i, code.builder.xor(v, ir.Constant(v.type, [128] * v.type.count))) for i, v in signed]
    return [(code.halves(blocks, 0), columns)], None


def _two_bits(code: LaneCode, blocks: list, _group):
    """See `two_bits.py`: each code twice, less 3, times half of the step."""
    columns = []
    for half in range(2):
        codes = code.gather(BYTE, 4, blocks, 16 + 32 * half)
        columns += [(16 * half + 4 * i, code.mask(code.shift_bytes(codes, 2 * i - 1), 6)) for i in range(4)]
    return [(code.halves(blocks, 0), columns)], None


def _q4_k(code: LaneCode, blocks: list, group):
    columns = [pair for i in range(4) for pair in zip(_COLUMNS[i], _nibbles(code, blocks, group, 64, i), strict=True)]
    scale, minimum = _six_bits(code, blocks, group)
    return [(scale, columns)], minimum


def _q5_k(code: LaneCode, blocks: list, group):
    """As Q4_K, with 8 groups of 4 bytes of every row between: the fifth bits."""
    fifth = code.gather(BYTE, 4, _moved(code, blocks, group, 16), 64)
    columns = []
    for i in range(4):
        bits = (_FIRST_BIT[i], _FIRST_BIT[i] + 1)
        lower = _nibbles(code, blocks, group, 192, i)
        upper = [code.mask(code.shift_bytes(fifth, bit - 4), 16) for bit in bits]
        columns += [(c, code.builder.or_(a, b)) for c, a, b in zip(_COLUMNS[i], lower, upper, strict=True)]
    scale, minimum = _six_bits(code, blocks, group)
    return [(scale, columns)], minimum


def _q6_k(code: LaneCode, blocks: list, group):
    """4 float16 scales, 16 times 4 int8 scales of 16 columns, 16 of 4 bytes of every row's upper bits, 32 of lower."""
    scale, parts = code.halves(blocks, 0), []
    upper_bits, own_scales = _moved(code, blocks, group, 32), _moved(code, blocks, group, 8)
    for half in range(2):
        upper = code.gather(BYTE, 4, upper_bits, 72 + 16 * half)
        columns = []
        for i in (half, half + 2):
            shifts = (2 * (i - half) - 4, 2 * (i - half) - 2)
            lower = _nibbles(code, blocks, group, 328, i)
            pairs = zip(_COLUMNS[i], lower, shifts, strict=True)
            columns += [(c, code.builder.or_(v, code.mask(code.shift_bytes(upper, by), 48))) for c, v, by in pairs]
        own = code.builder.sitofp(code.gather(BYTE, 1, own_scales, 8 + 4 * half), scale.type)
        parts.append((code.builder.fmul(scale, own), columns))
    return parts, None


# Of K-quants: the columns in the lower and the upper halves of the four runs of a group's bytes; Q5_K's bits of them.
_COLUMNS = (0, 8), (16, 24), (4, 12), (20, 28)
_FIRST_BIT = 0, 4, 2, 6


def _moved(code: LaneCode, blocks: list, group, width: int) -> list:
    return [code.builder.add(block, code.builder.mul(group, INT64(width))) for block in blocks]


def _nibbles(code: LaneCode, blocks: list, group, start: int, run: int) -> tuple:
    packed = code.gather(BYTE, 4, _moved(code, blocks, group, 64), start + 16 * run)
    return code.mask(packed, 15), code.shift_bytes(packed, 4)


def _six_bits(code: LaneCode, blocks: list, group) -> tuple:
    """Scale and minimum: 4 float16 of each, then the upper bits of all groups' 6, then the lower.

    A row's byte of upper bits: 2 of the scale and 2 of the minimum, in its lower half those of groups 0 to 3.
    """
    builder = code.builder
    both = code.gather(BYTE, 1, _moved(code, blocks, builder.and_(group, INT64(3)), 4), 16)
    words = ir.VectorType(INT32, code.lanes // 4)  # no instruction shifts bytes by a variable count
    half = code.splat(builder.trunc(builder.and_(group, INT64(4)), INT32), code.lanes // 4)
    upper = builder.bitcast(builder.lshr(builder.bitcast(both, words), half), both.type)
    lower = code.gather(BYTE, 1, _moved(code, blocks, group, 4), 32)
    scales = builder.or_(code.mask(lower, 15), code.mask(code.shift_bytes(upper, -4), 48))
    minima = builder.or_(code.shift_bytes(lower, 4), code.mask(code.shift_bytes(upper, -2), 48))
    floats = ir.VectorType(FLOAT, code.lanes)
    return tuple(
        builder.fmul(code.halves(blocks, at), builder.uitofp(numbers, floats))
        for at, numbers in ((0, scales), (8, minima))
    )


class Format(NamedTuple):
    """rows: interleaved. size: bytes of an interleaved block. groups: of COLUMNS columns in it.

    offset: of the unsigned weights, 0 where the blocks have minima. parts: with scales of their own in a group.
    """

    rows: int
    size: int
    groups: int
    offset: int
    parts: int
    unpack: Callable


FORMATS = {  # by the library's number of the type
    202: Format(8, 8 * 18, 1, 8, 1, _q4_0),
    208: Format(8, 8 * 34, 1, 128, 1, _q8_0),
    212: Format(4, 4 * 144, 8, 0, 1, _q4_k),
    213: Format(4, 4 * 176, 8, 0, 1, _q5_k),
    214: Format(4, 4 * 210, 8, 32, 2, _q6_k),
    TWO_BITS: Format(8, 8 * 10, 1, 3, 1, _two_bits),
}
