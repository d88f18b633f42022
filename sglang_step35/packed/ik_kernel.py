"""`kernel.py` by ggml's kernels: all rows in one call, experts grouped by number inside it.

A graph is built once for its shapes and reused for every layer that has them: only addresses change between calls.
Letters: T tokens, k chosen experts of a token, E experts, H hidden size, I intermediate size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_step35.packed import amx_rows, ik_library, ik_rows
from sglang_step35.packed.ggml import GGMLTensor
from sglang_step35.packed.ik_library import F32, FLOAT, I32, Graph, Library, set_strides
from sglang_step35.packed.ik_weights import Readable, kind_of, operand, place, reads
from sglang_step35.packed.tensor import PackedTensor

# Tokens of one expert call: between gate/up and down it keeps k (I + H) floats of each, 90 MB for the published widths.
EXPERT_TOKENS = 512
AMX_TOKENS = 2048  # each expert's weights are unpacked once for all its rows: of 288 experts 14 a call are too few


def reads_experts(gate: PackedTensor, up: PackedTensor, down: PackedTensor) -> bool:
    """Whether the library runs these experts; gate and up must be of one type."""
    return reads(gate) and reads(up) and reads(down) and kind_of(gate) == kind_of(up)


def linear(x: Tensor, parts: Sequence[Readable]) -> Tensor:
    """See `kernel.linear`; every part must be one that `reads` accepts."""
    library, threads = ik_library.library(), torch.get_num_threads()
    tokens, columns = x.shape
    kinds = tuple((kind_of(part), part.shape[0]) for part in parts)
    out = torch.empty(tokens, sum(rows for _, rows in kinds), dtype=torch.float32)
    if tokens == 0:
        return out.to(x.dtype)
    key = ("linear", tokens, columns, kinds, threads)
    product = library.graph(key, lambda: _Linear(library, tokens, columns, kinds, threads))
    product.run(x.float().contiguous(), parts, out)
    return out.to(x.dtype)


def gather(ids: Tensor, table: GGMLTensor) -> Tensor:
    """See `kernel.gather`; the table must be one that `reads` accepts, the ids its own: the library asserts that."""
    library, (size, columns), count = ik_library.library(), table.shape, ids.numel()
    out = torch.empty(*ids.shape, columns, dtype=torch.float32)
    if count:
        threads = torch.get_num_threads() if count > ik_rows.ROWS else 1  # few rows are read before a second one wakes
        key = ("gather", count, columns, size, kind_of(table), threads)
        library.graph(key, lambda: _Gather(library, *key[1:])).run(ids.int().contiguous(), table, out)
    return out


def of_groups(x: Tensor, part: GGMLTensor, groups: Tensor, size: int) -> Tensor:
    """x [T, columns] times the rows of some groups of a part [rows, columns], `size` side by side from a multiple of it
    on. groups: [T, G], their numbers, for each row of x its own, none twice. [T, G, size] float32."""
    library, threads = ik_library.library(), torch.get_num_threads()
    stack = GGMLTensor(part.type, part.data.unflatten(0, (-1, size)))
    out = torch.empty(*groups.shape, size, dtype=torch.float32)
    key = ("groups", *groups.shape, stack.shape, kind_of(part), threads)
    run = library.graph(key, lambda: _Groups(library, *key[1:]))
    run.run(x.float().contiguous(), stack, groups.int().contiguous(), out)
    return out


def experts(
    x: Tensor,
    gate: Readable,
    up: Readable,
    down: Readable,
    weights: Tensor,
    ids: Tensor,
    limit: float | None,
) -> Tensor:
    """See `kernel.experts`; the three must be some that `reads_experts` accepts."""
    library, threads = ik_library.library(), torch.get_num_threads()
    out = torch.empty(x.shape, dtype=torch.float32)
    wide, numbers, weights = x.float().contiguous(), ids.int().contiguous(), weights.float().contiguous()
    at_once = AMX_TOKENS if amx_rows.supported() else EXPERT_TOKENS
    for start in range(0, len(x), at_once):
        cut = slice(start, start + at_once)
        shape = (*numbers[cut].shape, *down.shape)  # T, k, E, H, I
        key = ("experts", shape, kind_of(gate), kind_of(down), limit, threads)
        run = library.graph(key, lambda: _Experts(library, *key[1:]))  # noqa: B023
        run.run(wide[cut], gate, up, down, weights[cut], numbers[cut], out[cut])
    return out.to(x.dtype)


class _Linear:
    """x times several matrices, into the columns of one result."""

    def __init__(self, library: Library, tokens: int, columns: int, kinds: tuple, threads: int):
        x = library.tensor(F32, columns, tokens)
        weights = [operand(library, kind, columns, rows) for kind, rows in kinds]
        outputs = [ik_rows.product(library, weight, x) for weight in weights]
        row = FLOAT * sum(rows for _, rows in kinds)
        for output in outputs:
            set_strides(output.contents, row, row * tokens)
        self.graph = Graph(library, outputs, threads)
        self.x, self.weights = x.contents, [weight.contents for weight in weights]
        self.outputs = [output.contents for output in outputs]

    def run(self, x: Tensor, parts: Sequence[Readable], out: Tensor) -> None:
        self.x.data = x.data_ptr()
        address = out.data_ptr()
        for weight, output, part in zip(self.weights, self.outputs, parts, strict=True):
            place(weight, part)
            output.data = address
            address += FLOAT * part.shape[0]
        self.graph.run()


class _Gather:
    """Rows of a table in float32."""

    def __init__(self, library: Library, count: int, columns: int, size: int, kind: int, threads: int):
        table, ids = operand(library, kind, columns, size), library.tensor(I32, count)
        out = library.ggml_get_rows(library.arena, table, ids)
        self.graph = Graph(library, (out,), threads)
        self.table, self.ids, self.out = table.contents, ids.contents, out.contents

    def run(self, ids: Tensor, table: GGMLTensor, out: Tensor) -> None:
        place(self.table, table)
        self.ids.data, self.out.data = ids.data_ptr(), out.data_ptr()
        self.graph.run()


class _Groups:
    """x times some matrices of a stack."""

    def __init__(self, library: Library, tokens: int, count: int, shape: tuple[int, ...], kind: int, threads: int):
        number, rows, columns = shape
        weight = operand(library, kind, columns, rows, number)
        x, ids = library.tensor(F32, columns, 1, tokens), library.tensor(I32, count, tokens)
        out = ik_rows.expert_product(library, weight, x, ids)
        self.graph = Graph(library, (out,), threads)
        self.weight, self.x, self.ids, self.out = weight.contents, x.contents, ids.contents, out.contents

    def run(self, x: Tensor, stack: GGMLTensor, ids: Tensor, out: Tensor) -> None:
        place(self.weight, stack)
        self.x.data, self.ids.data, self.out.data = x.data_ptr(), ids.data_ptr(), out.data_ptr()
        self.graph.run()


class _Experts:
    """down(min(silu(gate x), limit) * clamp(up x, -limit, limit)) of each chosen expert, and their weighted sum."""

    def __init__(self, library: Library, shape: tuple, kind: int, down_kind: int, limit: float | None, threads: int):
        tokens, top_k, experts, hidden, size = shape
        gate, up = (operand(library, kind, hidden, size, experts) for _ in range(2))
        down = operand(library, down_kind, size, hidden, experts)
        x = library.tensor(F32, hidden, 1, tokens)
        ids, weights = library.tensor(I32, top_k, tokens), library.tensor(F32, 1, top_k, tokens)
        inner = ik_rows.expert_gated(library, gate, up, x, ids, limit)
        rows = ik_rows.expert_product(library, down, inner, ids)
        out = library.ggml_mul_multi_add(library.arena, rows, weights)
        self.graph = Graph(library, (out,), threads)
        self.operands = [tensor.contents for tensor in (x, weights, ids, out)]
        self.parts = [tensor.contents for tensor in (gate, up, down)]
        self.between = [tensor.contents for tensor in (inner, rows)]
        self.sizes = [FLOAT * tokens * top_k * width for width in (size, hidden)]
        self.library = library

    def run(
        self, x: Tensor, gate: Readable, up: Readable, down: Readable, weights: Tensor, ids: Tensor, out: Tensor
    ) -> None:
        for tensor, part in zip(self.parts, (gate, up, down), strict=True):
            place(tensor, part)
        for place_of, tensor in zip(self.operands, (x, weights, ids, out), strict=True):
            place_of.data = tensor.data_ptr()
        address = self.library.rows.address(sum(self.sizes))
        for tensor, size in zip(self.between, self.sizes, strict=True):
            tensor.data, address = address, address + size
        self.graph.run()
