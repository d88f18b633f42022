"""`kernel.py` by ggml's kernels: all rows in one call, experts grouped by number inside it.

A graph is built once for its shapes and reused for every layer that has them: only addresses change between calls.
Letters: T tokens, k chosen experts of a token, E experts, H hidden size, I intermediate size.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from sglang_step35.packed import ik_library, ik_rows
from sglang_step35.packed.ggml import GGMLTensor
from sglang_step35.packed.ik_library import F32, FLOAT, I32, Graph, Library, place, set_strides
from sglang_step35.packed.tensor import PackedTensor

# Tokens of one expert call: between gate/up and down it keeps k (I + H) floats of each, 90 MB for the published widths.
EXPERT_TOKENS = 512
# The library's Q4_1 leaves the columns after the last whole 128 out of the sum, from 32 rows on.
Q4_1, Q4_1_COLUMNS = 3, 128


def reads(part: PackedTensor) -> TypeGuard[GGMLTensor]:
    """Whether the library multiplies by this matrix, or stack of matrices, where it lies."""
    if not isinstance(part, GGMLTensor) or part.data.stride(-1) != 1:
        return False
    return part.type.number != Q4_1 or part.shape[-1] % Q4_1_COLUMNS == 0


def reads_experts(gate: PackedTensor, up: PackedTensor, down: PackedTensor) -> bool:
    """Whether the library runs these experts; gate and up must be of one type."""
    return reads(gate) and reads(up) and reads(down) and gate.type is up.type


def linear(x: Tensor, parts: Sequence[GGMLTensor]) -> Tensor:
    """See `kernel.linear`; every part must be one that `reads` accepts."""
    library, threads = ik_library.library(), torch.get_num_threads()
    tokens, columns = x.shape
    kinds = tuple((part.type.number, part.shape[0]) for part in parts)
    out = torch.empty(tokens, sum(rows for _, rows in kinds), dtype=torch.float32)
    if tokens == 0:
        return out.to(x.dtype)
    key = ("linear", tokens, columns, kinds, threads)
    product = library.graph(key, lambda: _Linear(library, tokens, columns, kinds, threads))
    product.run(x.float().contiguous(), parts, out)
    return out.to(x.dtype)


def experts(
    x: Tensor,
    gate: GGMLTensor,
    up: GGMLTensor,
    down: GGMLTensor,
    weights: Tensor,
    ids: Tensor,
    limit: float | None,
) -> Tensor:
    """See `kernel.experts`; the three must be some that `reads_experts` accepts."""
    library, threads = ik_library.library(), torch.get_num_threads()
    out = torch.empty(x.shape, dtype=torch.float32)
    wide, numbers, weights = x.float().contiguous(), ids.int().contiguous(), weights.float().contiguous()
    for start in range(0, len(x), EXPERT_TOKENS):
        cut = slice(start, start + EXPERT_TOKENS)
        shape = (*numbers[cut].shape, *down.shape)  # T, k, E, H, I
        key = ("experts", shape, gate.type.number, down.type.number, limit, threads)
        run = library.graph(key, lambda: _Experts(library, *key[1:]))  # noqa: B023
        run.run(wide[cut], gate, up, down, weights[cut], numbers[cut], out[cut])
    return out.to(x.dtype)


class _Linear:
    """x times several matrices, into the columns of one result."""

    def __init__(self, library: Library, tokens: int, columns: int, kinds: tuple, threads: int):
        x = library.tensor(F32, columns, tokens)
        weights = [library.tensor(kind, columns, rows) for kind, rows in kinds]
        outputs = [ik_rows.product(library, weight, x) for weight in weights]
        row = FLOAT * sum(rows for _, rows in kinds)
        for output in outputs:
            set_strides(output.contents, row, row * tokens)
        self.graph = Graph(library, outputs, threads)
        self.x, self.weights = x.contents, [weight.contents for weight in weights]
        self.outputs = [output.contents for output in outputs]

    def run(self, x: Tensor, parts: Sequence[GGMLTensor], out: Tensor) -> None:
        self.x.data = x.data_ptr()
        address = out.data_ptr()
        for weight, output, part in zip(self.weights, self.outputs, parts, strict=True):
            place(weight, part.data)
            output.data = address
            address += FLOAT * part.shape[0]
        self.graph.run()


class _Experts:
    """down(min(silu(gate x), limit) * clamp(up x, -limit, limit)) of each chosen expert, and their weighted sum."""

    def __init__(self, library: Library, shape: tuple, kind: int, down_kind: int, limit: float | None, threads: int):
        tokens, top_k, experts, hidden, size = shape
        gate, up = (library.tensor(kind, hidden, size, experts) for _ in range(2))
        down = library.tensor(down_kind, size, hidden, experts)
        x = library.tensor(F32, hidden, 1, tokens)
        ids, weights = library.tensor(I32, top_k, tokens), library.tensor(F32, 1, top_k, tokens)
        inner = ik_rows.expert_gated(library, gate, up, x, ids, limit)
        rows = ik_rows.expert_product(library, down, inner, ids)
        out = library.ggml_mul_multi_add(library.arena, rows, weights)
        self.graph = Graph(library, (out,), threads)
        self.operands = [tensor.contents for tensor in (x, gate, up, down, weights, ids, out)]
        self.between = [tensor.contents for tensor in (inner, rows)]
        self.sizes = [FLOAT * tokens * top_k * width for width in (size, hidden)]
        self.library = library

    def run(
        self, x: Tensor, gate: GGMLTensor, up: GGMLTensor, down: GGMLTensor, weights: Tensor, ids: Tensor, out: Tensor
    ) -> None:
        tensors = (x, gate.data, up.data, down.data, weights, ids, out)
        for operand, tensor in zip(self.operands, tensors, strict=True):
            if tensor.dtype is torch.uint8:
                place(operand, tensor)
            else:
                operand.data = tensor.data_ptr()
        address = self.library.rows.address(sum(self.sizes))
        for tensor, size in zip(self.between, self.sizes, strict=True):
            tensor.data, address = address, address + size
        self.graph.run()
