"""A pass of the MTP layers on one rank by ggml's kernels: each layer from its input's norms to its logits.

Of a layer there are two graphs, so that neither is built for every pair of numbers of rows and requests:

    norms of embedding and hidden state, eh_proj, the decoder layer with its attention
    the rows that predict a draft, norm, head

The hidden states between the layers stay where the graphs read and write them, in float32. Letters: T rows of a pass,
B requests, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import Tensor, nn

from sglang_step35.attention.portable.paged_steps import PagedSteps
from sglang_step35.model import single_rank
from sglang_step35.model.draft_heads import ScreenedTable
from sglang_step35.model.graphed_layers import GraphedLayers
from sglang_step35.model.layer_steps import ROWS, Layer, Memory, Norm, Place, begin, matrices
from sglang_step35.model.product import is_packed
from sglang_step35.model.shared_tables import SharedTables
from sglang_step35.packed import ik_kernel, ik_library
from sglang_step35.packed.ggml import GGMLTensor
from sglang_step35.packed.ik_library import FLOAT, GRAPH_NODES, I32, Graph, set_strides
from sglang_step35.packed.ik_steps import Steps


@dataclass(frozen=True)
class Surroundings:
    """What an MTP layer has besides its decoder layer and its head."""

    embeds: Norm
    hidden: Norm
    projection: GGMLTensor
    output: Norm

    @classmethod
    def of(cls, layer: nn.Module) -> "Surroundings":
        norms = (Norm.of(norm) for norm in (layer.enorm, layer.hnorm))
        return cls(*norms, *matrices(layer.eh_proj), Norm.of(layer.shared_head_norm))


class PassMemory(Memory):
    """`stream` is the hidden states of the pass besides. last: the rows that predict a draft; normed: what their logits
    are products of."""

    def __init__(self, layers: Sequence[Layer]):
        super().__init__(layers)
        self.hidden_size = layers[0].output.shape[0]
        self.embeds, self.pairs = Place(self.hidden_size), Place(2 * self.hidden_size)
        self.last, self.normed = torch.zeros(ROWS, dtype=torch.int32), Place(self.hidden_size)


class GraphedMTP(GraphedLayers):
    """All MTP layers of a model, for passes of few rows.

    tables: gives a layer's embedding and head, which may be other ones in every pass.
    """

    def __init__(self, layers: Sequence[nn.Module], tables: SharedTables):
        super().__init__([layer.block for layer in layers])
        self._mtp_layers = tuple(layers)
        self._embedding, self._head = tables.embedding, tables.draft_head

    def refresh(self) -> None:
        super().refresh()
        self._around: list[Surroundings] = []

    def _weights(self) -> list[Layer]:
        if self._read is None and super()._weights():
            self._around = [Surroundings.of(layer) for layer in self._mtp_layers]
            others = [around.projection for around in self._around]
            others += [part for depth in range(len(self.layers)) for part in matrices(self._head(depth))]
            self._read = self._read if all(map(ik_kernel.reads, others)) else []
        return super()._weights()

    def start(self, positions: Tensor, hidden: Tensor, last: Tensor, forward_batch) -> "GraphedPass | None":
        """A pass, see `mtp_pass.LayerPass`; None where graphs are not faster or attention takes more than one call."""
        if not self._faster(hidden):
            return None
        rows, layers = len(hidden), self._weights()
        attention = self._planned(rows, hidden.dtype, forward_batch)
        if attention is None:
            return None
        if self._memory is None:
            self._memory = PassMemory(layers)
        memory, turns = self._memory, layers[0].attention.qk_norm_rope.rows
        turns.start(positions)
        memory.fill_turns(turns, rows)
        memory.stream.rows(hidden.shape).copy_(hidden)
        memory.last[: len(last)].copy_(last)
        return GraphedPass(self, attention, hidden.dtype, len(last))

    def _faster(self, x: Tensor) -> bool:
        return all(layer.runs_single_rank for layer in self._mtp_layers) and super()._faster(x)

    def run(self, depth: int, tokens: Tensor, attention: PagedSteps, whole: bool = True) -> None:
        """A layer on the hidden states in memory, which it replaces; not whole: its keys and values alone."""
        library, threads = ik_library.library(), torch.get_num_threads()
        embeds = single_rank.embed(tokens, self._embedding(depth))
        self._memory.embeds.rows(embeds.shape).copy_(embeds)
        key = ("mtp", self._serial, depth, id(attention), whole, threads)
        build = lambda: self._build_layer(Steps(library), depth, attention, whole, threads)
        library.graph(key, build, 2 * GRAPH_NODES).run()

    def _build_layer(self, steps: Steps, depth: int, attention: PagedSteps, whole: bool, threads: int) -> Graph:
        memory, rows = self._memory, attention.rows
        *halves, stream = self._input(steps, depth, rows)
        if whole:
            out = self._whole(steps, depth, stream, attention)
        else:
            _, *written = begin(steps, self._weights()[depth], stream, memory, rows)[:3]
            out = attention.store(steps, depth, *written, before=written)
        return steps.build([*halves, out], memory.between, threads)

    def _input(self, steps: Steps, depth: int, rows: int) -> tuple:
        """The two normed halves, which stand side by side in memory, and what the decoder layer reads: their product,
        in the place of the hidden states."""
        memory, around, size = self._memory, self._around[depth], self._memory.hidden_size
        embeds, hidden = (place.of(steps, size, rows) for place in (memory.embeds, memory.stream))
        halves = around.embeds.of_rows(steps, embeds), around.hidden.of_rows(steps, hidden)
        for number, half in enumerate(halves):
            half.contents.data = memory.pairs.address + number * size * FLOAT
            set_strides(half.contents, 2 * size * FLOAT, 2 * size * FLOAT * rows)
        stream = steps.product(memory.pairs.of(steps, 2 * size, rows), around.projection)
        stream.contents.data = memory.stream.address
        return *halves, stream

    def logits(self, depth: int, count: int) -> Tensor:
        """[B, V] float32 of the first `count` rows in `PassMemory.last`."""
        library, threads, table = ik_library.library(), torch.get_num_threads(), self._head(depth, count)
        key = ("mtp head", self._serial, depth, _address(table), count, threads)
        build = lambda: self._build_head(Steps(library), depth, *matrices(table), count, threads)
        graph, out, head = library.graph(key, build)
        found = torch.empty(count, head.shape[0])
        out.data = found.data_ptr()
        graph.run()
        if isinstance(table.quant_method, ScreenedTable):
            table.quant_method.refine(found, self._memory.normed.rows((count, self._memory.hidden_size)))
        return found[:, : table.org_vocab_size]

    def _build_head(self, steps: Steps, depth: int, head: GGMLTensor, count: int, threads: int) -> tuple:
        """The graph, its result, and the head, which stays where it is as long as the graph."""
        memory = self._memory
        rows = steps.library.tensor(I32, count)
        rows.contents.data = memory.last.data_ptr()
        states = steps.get_rows(memory.stream.of(steps, memory.hidden_size, ROWS), rows)
        normed = self._around[depth].output.of_rows(steps, states)
        normed.contents.data = memory.normed.address
        logits = steps.product(normed, head)
        logits.contents.data = memory.stream.address  # until there is memory for them
        return steps.build([logits], memory.between, threads), logits.contents, head

    def hidden(self, rows: int) -> Tensor:
        """[T, H] float32, what the last layer that ran has left in memory."""
        return self._memory.stream.rows((rows, self._memory.hidden_size))


class GraphedPass:
    """See `mtp_pass.LayerPass`. Another one of the same model ends it."""

    def __init__(self, graphs: GraphedMTP, attention: PagedSteps, dtype: torch.dtype, count: int):
        """count: rows that predict a draft."""
        self._graphs, self._attention, self._dtype, self._count = graphs, attention, dtype, count

    @property
    def hidden(self) -> Tensor:
        return self._graphs.hidden(self._attention.rows).to(self._dtype)

    def logits(self, depth: int, tokens: Tensor) -> Tensor:
        self.forward(depth, tokens)
        return self._graphs.logits(depth, self._count)

    def forward(self, depth: int, tokens: Tensor) -> None:
        self._graphs.run(depth, tokens, self._attention)

    def write_kv(self, depth: int, tokens: Tensor) -> None:
        self._graphs.run(depth, tokens, self._attention, whole=False)


def _address(table: VocabParallelEmbedding) -> int:
    """Of its matrix: packed ones move when the backbone's weights change."""
    return table.qweight.rows()[0].data.data_ptr() if is_packed(table) else table.weight.data_ptr()
