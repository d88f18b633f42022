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
from sglang_step35.model.draft_heads import DraftHeads
from sglang_step35.model.vocab import embedding, keeps_packed, output_head
from sglang_step35.packed.ggml import GGMLTensor
from sglang_step35.packed.methods import PackedConfig
from sglang_step35.packed.parameter import PackedParameter, as_packed
from sglang_step35.packed.sglang_gguf import load_table
from sglang_step35.packed.tensor import PackedTensor

BLOCK_ROWS = 4096  # rows compared at a time; the first differing block ends the comparison
BACKBONE = "backbone"
OWN = "own"


class SharedTables(nn.Module):
    """The embedding and the head of each of S MTP layers.

    Between `keep` and `resolve` the copies stay where the reader left them, normally in files
    mapped into memory.
    """

    def __init__(self, spec: ModelSpec, num_layers: int, quant_config=None):
        super().__init__()
        packed = quant_config if keeps_packed(quant_config) else None
        self._makers: dict[str, Callable[[], VocabParallelEmbedding]] = {
            "embedding": lambda: embedding(spec, packed),
            "head": lambda: output_head(spec, packed),
        }
        self._make_packed = lambda: output_head(spec, PackedConfig())
        self._rounded: DraftHeads | None = None
        self._num_layers = num_layers
        self._dtype = torch.get_default_dtype()
        # Shells without a weight: built on the meta device, given the backbone's parameters.
        self.backbone = nn.ModuleDict({kind: _shell(make) for kind, make in self._makers.items()})
        self.own = nn.ModuleDict()
        self._used: dict[tuple[int, str], VocabParallelEmbedding] = {}
        self._pending: dict[tuple[int, str], Tensor | PackedTensor] = {}

    def embedding(self, depth: int) -> VocabParallelEmbedding:
        return self._table(depth, "embedding")

    def head(self, depth: int) -> VocabParallelEmbedding:
        return self._table(depth, "head")

    def draft_head(self, depth: int, rows: int = 1) -> VocabParallelEmbedding:
        """What a layer's drafts of so many requests are chosen by: `head`, or its copy behind `round_heads`."""
        head = self.head(depth)
        return head if self._rounded is None else self._rounded.of(head, rows)

    def round_heads(self) -> int:
        """Draft by copies of the heads in fewer bits, where there can be any; behind `resolve`. Returns how many."""
        self._rounded = DraftHeads(self._make_packed)
        heads = [(self.head(depth), self.draft_head(depth)) for depth in range(self._num_layers)]
        return len({id(copy) for head, copy in heads if copy is not head})

    def keep(self, copies: dict[tuple[int, str], Tensor | PackedTensor]) -> None:
        """Note the checkpoint's copies, (depth, kind) -> [V, H]; a later load replaces them."""
        self._pending.update(copies)
        if self._used:
            self.resolve(self.backbone["embedding"], self.backbone["head"])

    def resolve(self, embed: VocabParallelEmbedding, head: VocabParallelEmbedding) -> dict[str, str]:
        """Take the backbone's tables and drop equal copies.

        Returns {"layer 0 embedding": "backbone" | "own" | "layer j's own"}.
        """
        for kind, table in (("embedding", embed), ("head", head)):
            self.backbone[kind].quant_method = table.quant_method
            for name, parameter in table.named_parameters(recurse=False):
                setattr(self.backbone[kind], name, parameter)
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

    def _own(self, depth: int, kind: str, copy: Tensor | PackedTensor) -> VocabParallelEmbedding:
        """A table of the layer's own, filled with this rank's part of `copy`."""
        like = next(self.backbone[kind].parameters())
        with _construction(self._dtype, like.device):
            table = self._makers[kind]()
        packed = getattr(table, "qweight", None)
        if isinstance(packed, PackedParameter):
            packed.fill(None, copy)
            packed.prepare()
        elif isinstance(copy, GGMLTensor):
            load_table(table, copy, self._dtype)
        else:
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
    for name, _ in list(table.named_parameters(recurse=False)):
        setattr(table, name, None)
    table.quant_method = None  # else SGLang would process its weights after loading
    return table


def _equal(table: VocabParallelEmbedding, copy: Tensor | PackedTensor) -> bool:
    """Whether this rank's rows of `copy` [V, H], in the table's dtype, are the table's bit by bit.

    Packed ones must be of the same type; those in SGLang's own GGUF layers are not compared.
    """
    packed = getattr(table, "qweight", None)
    if packed is not None:
        return isinstance(packed, PackedParameter) and packed.as_given()[0].equals(packed.cut(None, as_packed(copy)))
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
