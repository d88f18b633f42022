"""Weights as operands of ggml's steps: a tensor for their bytes, and for FP8's scales another one behind it.

The library knows no FP8: its tensors of int8 stand for it, which `float8_kernels.py` multiplies by and nothing else.
Shapes are given as ggml counts them, the innermost dimension first.
"""

from ctypes import POINTER, c_void_p, cast
from typing import TypeGuard

import torch

from sglang_step35.packed.blocks import BlockTensor
from sglang_step35.packed.ggml import GGMLTensor
from sglang_step35.packed.ik_library import F32, FLOAT, I8, CTensor, Library, set_strides
from sglang_step35.packed.tensor import PackedTensor

FLOAT8 = I8
FLOAT8_COLUMNS = 32  # that have one scale, or a multiple of them
# The library's Q4_1 leaves the columns after the last whole 128 out of the sum, from 32 rows on: seen on two EPYCs,
# not on Emerald Rapids.
Q4_1, Q4_1_COLUMNS = 3, 128

Readable = GGMLTensor | BlockTensor


def reads(part: PackedTensor) -> TypeGuard[Readable]:
    """Whether there are kernels for this matrix, or stack of matrices, where it lies."""
    if isinstance(part, BlockTensor):
        return _reads_blocks(part)
    if not isinstance(part, GGMLTensor) or part.data.stride(-1) != 1:
        return False
    return part.type.number != Q4_1 or part.shape[-1] % Q4_1_COLUMNS == 0


def _reads_blocks(part: BlockTensor) -> bool:
    columns = part.shape[-1], part.block[1], part.first[1]
    kinds = part.values.dtype is torch.float8_e4m3fn and part.scales.dtype is torch.float32
    in_rows = part.values.stride(-1) == 1 and part.scales.stride(-1) == 1
    return kinds and in_rows and not any(count % FLOAT8_COLUMNS for count in columns)


def kind_of(part: Readable) -> int:
    """The library's number of the type, or the one that stands for it."""
    return FLOAT8 if isinstance(part, BlockTensor) else part.type.number


def operand(library: Library, kind: int, *shape: int):
    """A pointer to a new tensor for weights of this type; `place` says where they are."""
    tensor = library.tensor(kind, *shape)
    if kind == FLOAT8:
        tensor.contents.src[0] = cast(library.tensor(F32, 1), c_void_p)
    return tensor


def place(tensor: CTensor, part: Readable) -> None:
    """Let an `operand` be these weights.

    FP8's `op_params`: rows and columns that share a scale, row and column of the first weight among them.
    """
    if isinstance(part, GGMLTensor):
        _place(tensor, part.data, 1)
        return
    _place(tensor, part.values, 1)
    _place(cast(c_void_p(tensor.src[0]), POINTER(CTensor)).contents, part.scales, FLOAT)
    for i, value in enumerate((*part.block, *part.first)):
        tensor.op_params[i] = value


def _place(tensor: CTensor, data: torch.Tensor, size: int) -> None:
    """data: [.., rows, columns] of `size` bytes each."""
    tensor.data = data.data_ptr()
    row = data.stride(-2) * size
    set_strides(tensor, row, data.stride(0) * size if data.dim() == 3 else row * len(data))
