"""Packed weights put as ggml's kernels read them fastest, once after loading.

A prepared matrix replaces the mapped one, so that never two copies stay. INT4, INT8 and MXFP4, which ggml cannot read
as their files have them, become blocks of GGML types of about their size (0.5625 bytes a weight, asymmetric 0.625);
experts kept one by one become one stack; rows of Q8_0, Q4_0 and K-quants are interleaved by fours or eights, which
takes 0.5 to 0.7 of the time in place for one row of activations on one core, and 0.5 to 0.6 for four by the wheel's
kernels, less by `int8_rows.py`, while memory lasts: past that, GGML types stay mapped. What no type of about the size
holds keeps the file's bytes and runs in plain torch: asymmetric INT8 and narrow groups. FP8 is read where it lies, by
`float8_kernels.py` (as Q8_0 it would cost 0.5 % of a product, past the bounds of our tests).
What changes in a weight: nothing, but where float16 rounds the 12th bit of a scale or of zero point times scale.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import psutil
import torch
from torch import Tensor

from sglang_step35 import huge_pages
from sglang_step35.packed import ik_library, int8_rows, two_bits
from sglang_step35.packed.blocks import BlockTensor
from sglang_step35.packed.ggml import TYPES, GGMLTensor, GGMLType
from sglang_step35.packed.grouped import GroupedTensor, nibbles
from sglang_step35.packed.ik_check import usable
from sglang_step35.packed.ik_weights import Q4_1_COLUMNS, reads
from sglang_step35.packed.stack import StackedTensor
from sglang_step35.packed.tensor import PackedTensor

COLUMNS = 32  # of a block of every type that is written here
BLOCK_WEIGHTS = 1 << 22  # written at a time
KEPT_FREE = 4  # interleaving stops where less than one part in four of the host's memory would stay available
SCALE_ERROR = 2.0**-11  # of the largest scale: the rounding of float16


def _only_kernels(_blocks: Tensor) -> Tensor:
    raise TypeError("these rows are interleaved: only ggml's kernels read them")


_SYMMETRIC = {"INT4": "Q4_0", "INT8": "Q8_0", "INT8 + 128": "Q8_0"}  # by code
# By the type in place: what the library makes of it, and how many rows it interleaves.
INTERLEAVED = {
    name: (GGMLType(f"{name}_R{rows}", number, TYPES[name].block, TYPES[name].size, _only_kernels), rows)
    for name, number, rows in (
        ("Q4_0", 202, 8),
        ("Q8_0", 208, 8),
        ("Q4_K", 212, 4),
        ("Q5_K", 213, 4),
        ("Q6_K", 214, 4),
    )
}
SCREEN = GGMLType("2 bits", two_bits.TWO_BITS, two_bits.COLUMNS, two_bits.BLOCK // two_bits.ROWS, _only_kernels)


def prepared(tensor: PackedTensor) -> PackedTensor:
    """The same weights in memory of their own; `tensor` itself where the kernels read it best as it is, or not at all.

    Only for what is multiplied by: single rows of interleaved ones cannot be read.
    """
    if not usable():
        return tensor
    if all(isinstance(matrix, BlockTensor) for matrix in _matrices(tensor)):
        return _float8(tensor)
    kinds = {_written_as(matrix) for matrix in _matrices(tensor)}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        return tensor
    if isinstance(tensor, GGMLTensor):
        if not (_interleaves(tensor, kind) and _memory_allows(tensor.nbytes)):
            return tensor
    return _put(tensor, kind)


def can_round(tensor: PackedTensor) -> bool:
    """Whether `rounded` has kernels for a matrix of ordinary weights, and the host memory for the copy."""
    ordinary = isinstance(tensor, GGMLTensor) and tensor.type.plain and tensor.shape[-1] % COLUMNS == 0
    return ordinary and usable() and _memory_allows(tensor.shape[0] * tensor.shape[1])


def rounded(tensor: GGMLTensor) -> GGMLTensor:
    """A copy in 8 bits, a scale for every 32 columns, put as kernels read it fastest; off by half a percent."""
    return _put(tensor, TYPES["Q8_0"])


def can_screen(tensor: PackedTensor, spared: int) -> bool:
    """Whether `screened` has kernels for such a matrix and the host memory for the copy, which is to be so many bytes
    smaller than the matrix in no more than 8 bits."""
    if not isinstance(tensor, GGMLTensor):
        return False
    rows, columns = tensor.shape
    own, eight, two = (rows * columns // kind.block * kind.size for kind in (tensor.type, TYPES["Q8_0"], SCREEN))
    whole = rows % two_bits.ROWS == 0 == columns % two_bits.COLUMNS
    return whole and min(own, eight) - two >= spared and usable() and int8_rows.supported() and _memory_allows(two)


def screened(tensor: GGMLTensor) -> GGMLTensor:
    """A copy in 2 bits; products are off by a third of what they vary by."""
    return _write(tensor, SCREEN)


def _interleaves(tensor: PackedTensor, kind: GGMLType) -> bool:
    """Whether the library interleaves so many rows of this type."""
    return kind.name in INTERLEAVED and tensor.shape[-2] % INTERLEAVED[kind.name][1] == 0


def _put(tensor: PackedTensor, kind: GGMLType) -> GGMLTensor:
    """A copy of this type, interleaved where it can be."""
    written = _write(tensor, kind)
    return _interleave(written) if _interleaves(tensor, kind) else written


def _float8(tensor: PackedTensor) -> PackedTensor:
    """With scales in float32, and experts that were kept one by one as one stack, while memory lasts."""
    if isinstance(tensor, StackedTensor):
        blocks = _matrices(tensor)
        if len({matrix.kind for matrix in blocks}) > 1 or not _memory_allows(tensor.nbytes):
            return tensor
        values = torch.stack([matrix.values.view(torch.uint8) for matrix in blocks]).view(blocks[0].values.dtype)
        tensor = replace(blocks[0], values=values, scales=torch.stack([matrix.scales for matrix in blocks]))
    return replace(tensor, scales=tensor.scales.float())


def _matrices(tensor: PackedTensor) -> list[PackedTensor]:
    return [tensor.matrices[e] for e in sorted(tensor.matrices)] if isinstance(tensor, StackedTensor) else [tensor]


def _memory_allows(size: int) -> bool:
    """Whether a private copy leaves the host enough; mapped files count as available."""
    memory = psutil.virtual_memory()
    return memory.available - size > memory.total // KEPT_FREE


def _written_as(matrix: PackedTensor) -> GGMLType | None:
    """The type that holds these weights and that the kernels read; None without one."""
    if isinstance(matrix, GGMLTensor):
        return matrix.type if reads(matrix) else None
    grouped = isinstance(matrix, GroupedTensor) and matrix.shape[-1] % COLUMNS == 0 == matrix.group % COLUMNS
    return _grouped_as(matrix) if grouped else None


def _grouped_as(matrix: GroupedTensor) -> GGMLType | None:
    """A type that keeps the codes."""
    if matrix.scales.dtype is torch.uint8:
        return TYPES["MXFP4"]
    if not _fits(matrix.scales.float()):
        return None
    if matrix.zeros is None:
        return TYPES.get(_SYMMETRIC.get(matrix.code.name))
    fits = matrix.code.name == "UINT4" and matrix.shape[-1] % Q4_1_COLUMNS == 0
    return TYPES["Q4_1"] if fits else None


def _fits(scales: Tensor) -> bool:
    """Whether float16 keeps the scales to its last bit; tiny ones among larger lose what the larger ones round away."""
    return bool((scales.half().float() - scales).abs().max() <= scales.abs().max() * SCALE_ERROR)


def _write(tensor: PackedTensor, kind: GGMLType) -> GGMLTensor:
    """A copy as blocks of this type, in a stack where there are several matrices."""
    *leading, columns = tensor.shape
    data = torch.empty(*leading, columns // kind.block * kind.size, dtype=torch.uint8)
    huge_pages.use(data)
    pairs = zip(data, _matrices(tensor), strict=True) if isinstance(tensor, StackedTensor) else [(data, tensor)]
    for place, matrix in chain.from_iterable(_pieces(*pair) for pair in pairs):
        place.copy_(_rows_as(kind, matrix))
    return GGMLTensor(kind, data)


def _rows_as(kind: GGMLType, matrix: PackedTensor) -> Tensor:
    """Bytes of its rows: those it has, its codes as blocks, or ordinary weights rounded."""
    if kind is SCREEN:
        return two_bits.encode(matrix.dequantize())
    if not isinstance(matrix, GGMLTensor):
        return _WRITERS[kind.name](matrix)
    return matrix.data if matrix.type is kind else ik_library.library().quantize(kind.number, matrix.dequantize())


def _pieces(data: Tensor, tensor: PackedTensor) -> Iterator[tuple[Tensor, PackedTensor]]:
    """The same matrices in blocks of rows, whole eights of them, and where their bytes belong."""
    if data.dim() == 3:
        for e in range(len(data)):
            yield from _pieces(data[e], tensor[e])
        return
    step = max(1, BLOCK_WEIGHTS // tensor.shape[-1] // two_bits.ROWS) * two_bits.ROWS
    for start in range(0, len(data), step):
        yield data[start : start + step], tensor.rows(start, min(start + step, len(data)))


def _q4_0(matrix: GroupedTensor) -> Tensor:
    return _blocks(_halves(matrix.scales, matrix.group), _nibble_pairs(matrix))


def _q4_1(matrix: GroupedTensor) -> Tensor:
    """Value = scale code + minimum, the minimum being -zero point scale."""
    minima = -matrix.scales.float() * matrix.zeros.float()
    halves = (_halves(values, matrix.group) for values in (matrix.scales, minima))
    return _blocks(torch.cat(tuple(halves), dim=-1), _nibble_pairs(matrix))


def _mxfp4(matrix: GroupedTensor) -> Tensor:
    scales = matrix.scales.repeat_interleave(matrix.group // COLUMNS, dim=-1)
    return _blocks(scales.unsqueeze(-1), _nibble_pairs(matrix))


def _q8_0(matrix: GroupedTensor) -> Tensor:
    codes = matrix.codes if matrix.code.name == "INT8" else matrix.codes ^ 128
    return _blocks(_halves(matrix.scales, matrix.group), codes.unflatten(-1, (-1, COLUMNS)))


def _blocks(heads: Tensor, codes: Tensor) -> Tensor:
    """heads [R, blocks, b], codes [R, blocks, c] uint8 -> rows of bytes [R, blocks (b + c)]."""
    return torch.cat((heads, codes), dim=-1).flatten(-2)


def _halves(scales: Tensor, group: int) -> Tensor:
    """Scales [R, G] -> float16 of every block [R, blocks, 2] as bytes."""
    halves = scales.half().repeat_interleave(group // COLUMNS, dim=-1).contiguous()
    return halves.unsqueeze(-1).view(torch.uint8)


def _nibble_pairs(matrix: GroupedTensor) -> Tensor:
    """Codes as GGML keeps them [R, blocks, 16]: weight i of a block beside weight i + 16."""
    low, high = nibbles(matrix.codes).unflatten(-1, (-1, 2, COLUMNS // 2)).unbind(-2)
    return low | high << 4


_WRITERS: dict[str, Callable] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "MXFP4": _mxfp4}


def _interleave(tensor: GGMLTensor) -> GGMLTensor:
    """In place."""
    kind, _ = INTERLEAVED[tensor.type.name]
    ik_library.library().repack(tensor.type.number, kind.number, tensor.data, tensor.shape[-1])
    return GGMLTensor(kind, tensor.data)
