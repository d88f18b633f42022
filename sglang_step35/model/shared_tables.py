"""One copy in memory of equal vocabulary tables: the MTP layers' embeddings and heads.

Each MTP layer of a checkpoint may carry its own copy of the backbone's embedding and head, 1.06 GB
apiece in bfloat16. A copy is kept only where it differs from the backbone's.
Letters: V rows of the vocabulary (of this rank), H hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import Tensor, nn

from sglang_step35.config import ModelSpec
from sglang_step35.model.vocab import embedding, output_head

BLOCK_ROWS = 4096  # rows compared at a time; the first differing block ends the comparison
BACKBONE = "backbone"
OWN = "own"


class SharedTables(nn.Module):
    """The embedding and the head of each of S MTP layers.

    Between `keep` and `resolve` the copies stay where the reader left them, normally in files
    mapped into memory.
    """

    def __init__(self, spec: ModelSpec, num_layers: int):
        super().__init__()
        self._makers: dict[str, Callable[[], VocabParallelEmbedding]] = {
            "embedding": lambda: embedding(spec),
            "head": lambda: output_head(spec),
        }
        self._num_layers = num_layers
        # Shells without a weight: built on the meta device, filled with the backbone's tensors.
        self.backbone = nn.ModuleDict({kind: _shell(make) for kind, make in self._makers.items()})
        self.own = nn.ModuleDict()
        self._used: dict[tuple[int, str], VocabParallelEmbedding] = {}
        self._pending: dict[tuple[int, str], Tensor] = {}

    def embedding(self, depth: int) -> VocabParallelEmbedding:
        return self._table(depth, "embedding")

    def head(self, depth: int) -> VocabParallelEmbedding:
        return self._table(depth, "head")

    def keep(self, copies: dict[tuple[int, str], Tensor]) -> None:
        """Note the checkpoint's copies, (depth, kind) -> [V, H]; a later load replaces them."""
        self._pending.update(copies)
        if self._used:
            self.resolve(self.backbone["embedding"].weight, self.backbone["head"].weight)

    def resolve(self, embed: Tensor, head: Tensor) -> dict[str, str]:
        """Take the backbone's tables and drop equal copies.

        Returns {"layer 0 embedding": "backbone" | "own" | "layer j's own"}.
        """
        for kind, weight in (("embedding", embed), ("head", head)):
            self.backbone[kind].weight = _as_parameter(weight)
        report = {}
        for depth in range(self._num_layers):
            for kind in ("embedding", "head"):
                report[f"layer {depth} {kind}"] = self._resolve(depth, kind)
        return report

    def _resolve(self, depth: int, kind: str) -> str:
        """Choose the table of one layer; returns its source."""
        copy = self._pending.pop((depth, kind), None)
        if copy is None:
            self._used.setdefault((depth, kind), self.backbone[kind])
        else:
            equal = (table for table in self._candidates(depth, kind) if _equal(table, copy))
            self._used[depth, kind] = next(equal, None) or self._own(depth, kind, copy)
        return self._source(depth, kind)

    def _candidates(self, depth: int, kind: str) -> Iterator[VocabParallelEmbedding]:
        yield self.backbone[kind]
        yield from (self.own[_key(d, kind)] for d in range(depth) if _key(d, kind) in self.own)

    def _own(self, depth: int, kind: str, copy: Tensor) -> VocabParallelEmbedding:
        """A table of the layer's own, filled with this rank's part of `copy`."""
        like = self.backbone[kind].weight
        with _construction(like.dtype, like.device):
            table = self._makers[kind]()
        table.weight.weight_loader(table.weight, copy)
        self.own[_key(depth, kind)] = table
        return table

    def _source(self, depth: int, kind: str) -> str:
        used = self._used[depth, kind]
        if used is self.backbone[kind]:
            return BACKBONE
        for owner in range(depth):
            if self._used[owner, kind] is used:
                return f"layer {owner}'s own"
        return OWN

    def _table(self, depth: int, kind: str) -> VocabParallelEmbedding:
        if (depth, kind) not in self._used:
            raise RuntimeError("call set_embed_and_head or share_with before the first forward")
        return self._used[depth, kind]


def _key(depth: int, kind: str) -> str:
    return f"layer_{depth}_{kind}"


def _shell(make: Callable[[], VocabParallelEmbedding]) -> VocabParallelEmbedding:
    with torch.device("meta"):
        table = make()
    del table.weight
    table.register_parameter("weight", None)
    return table


def _as_parameter(weight: Tensor) -> nn.Parameter:
    return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)


def _equal(table: VocabParallelEmbedding, copy: Tensor) -> bool:
    """Whether this rank's rows of `copy` [V, H], in the table's dtype, are the table's bit by bit."""
    start = table.shard_indices.org_vocab_start_index
    rows = table.shard_indices.org_vocab_end_index - start
    weight, copy = table.weight.data, copy[start : start + rows]
    return all(
        torch.equal(weight[row : min(row + BLOCK_ROWS, rows)], _like(copy[row : row + BLOCK_ROWS], weight))
        for row in range(0, rows, BLOCK_ROWS)
    )


def _like(block: Tensor, weight: Tensor) -> Tensor:
    return block.to(device=weight.device, dtype=weight.dtype)


@contextmanager
def _construction(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Make new parameters of this dtype on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
