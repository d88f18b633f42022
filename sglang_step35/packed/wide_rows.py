"""Products of very many rows by torch: interleaved weights become bfloat16 before, a few rows of them at a time.

Where the CPU has AMX, torch multiplies many rows by bfloat16 weights up to twice as fast as `amx_rows.py`, which
unpacks a weight anew for each few rows of activations: 1.2 times for 512 rows, 1.4 to 1.8 for 2,048, unpacking
included (Emerald Rapids, two threads). Activations and weights are rounded as there. Letters: T tokens, K columns,
N rows of a matrix.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sglang_step35.packed import amx_rows, ik_library, int8_rows
from sglang_step35.packed.ggml import TYPES, GGMLTensor
from sglang_step35.packed.ik_library import Graph, Library, set_strides
from sglang_step35.packed.ik_weights import operand, place

FEWEST = 512  # tokens: unpacking takes a tenth of the time of their product
AT_ONCE = 1 << 22  # weights, 8 MB that are still in a cache when torch reads them
PAD = 32  # columns: rows 8 KB apart would share a set of the cache
SIDE = 2 * amx_rows.AT_ONCE  # rows of weights that are unpacked together
_BF16 = TYPES["BF16"]


def takes(tokens: int, part: GGMLTensor) -> bool:
    """Whether the products of so many tokens with this matrix [N, K] are faster here, where torch multiplies bfloat16
    by the CPU's instructions."""
    if part.type is _BF16:
        return True
    rows, columns = part.shape
    whole = rows >= SIDE and rows % amx_rows.AT_ONCE == 0 == columns % amx_rows.COLUMNS
    return tokens >= FEWEST and part.type.number in int8_rows.KINDS and whole and amx_rows.supported()


def linear(x: Tensor, parts: Sequence[GGMLTensor]) -> Tensor:
    """See `kernel.linear`; x [T, K] bfloat16, every part one that `takes` accepts."""
    out = x.new_empty(len(x), sum(part.shape[0] for part in parts))
    start = 0
    for part in parts:
        for weights in _bfloat16(part):
            end = start + len(weights)
            torch.mm(x, weights.t(), out=out[:, start:end])
            start = end
    return out


def _bfloat16(part: GGMLTensor) -> Iterator[Tensor]:
    """The rows of a matrix in order, some at a time, each valid until the next ones."""
    if part.type is _BF16:
        yield part.data.view(torch.bfloat16)
        return
    library, threads = ik_library.library(), torch.get_num_threads()
    rows, columns = part.shape
    at_once = max(SIDE, AT_ONCE // columns // SIDE * SIDE)
    starts = range(0, rows - SIDE // 2, at_once)  # eight rows alone go with those before
    for start, end in pairwise((*starts, rows)):
        key = ("wide", part.type.number, columns, end - start, threads)
        yield library.graph(key, lambda: _Unpack(library, *key[1:])).run(part.rows(start, end))  # noqa: B023


class _Unpack:
    """Rows of a matrix in bfloat16."""

    def __init__(self, library: Library, kind: int, columns: int, count: int, threads: int):
        from sglang_step35.packed.wide_kernels import unpacker  # importing numba takes a second: only where needed

        weights = operand(library, kind, columns, count)
        out = library.callback(unpacker(kind), None, (columns, count), weights, kind=_BF16.number)
        row = _BF16.size * (columns + PAD)
        set_strides(out.contents, row, row * count)
        self.graph = Graph(library, (out,), threads)
        self.weights, self.out, self.memory = weights.contents, out.contents, library.rows

    def run(self, part: GGMLTensor) -> Tensor:
        place(self.weights, part)
        count, columns = part.shape
        found = self.memory.bytes(self.out.nb[2]).view(torch.bfloat16).view(count, columns + PAD)
        self.out.data = found.data_ptr()
        self.graph.run()
        return found[:, :columns]
