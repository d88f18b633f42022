"""Decoder layers on one rank by ggml's kernels, everything between two attentions in one call.

A step of one token is about a hundred small tensor operations a layer, which cost as much in Python and dispatch as the
weights do in memory traffic. Here they are steps of a graph that is built once for each layer and number of rows:

    norm, q, k, v and gates, query-key norm, rotary embedding | attention by the backend | gate, output, residual,
    norm, router, experts and shared expert or dense network, residual, the next layer's norm, ...

Letters: T tokens, H hidden size.
"""

from collections.abc import Sequence
from itertools import count

import torch
from sglang.srt.model_executor.forward_context import get_attn_backend
from torch import Tensor, nn

from sglang_step35.attention.portable.paged_steps import PagedSteps
from sglang_step35.model import single_rank
from sglang_step35.model.attention import GatedAttention
from sglang_step35.model.decoder import DecoderLayer
from sglang_step35.model.layer_steps import ROWS, Layer, Memory, begin, end
from sglang_step35.packed import ik_library
from sglang_step35.packed.ik_check import usable
from sglang_step35.packed.ik_library import GRAPH_NODES, Graph
from sglang_step35.packed.ik_steps import Steps

_SERIAL = count()


class GraphedLayers(nn.Module):
    """Consecutive decoder layers on one rank: by graphs where those are faster, else in plain torch."""

    def __init__(self, layers: Sequence[DecoderLayer]):
        super().__init__()
        self.layers = tuple(layers)  # no submodules: the model owns them
        self.refresh()

    def refresh(self) -> None:
        """Follow a change of the weights."""
        self._read: list[Layer] | None = None
        self._serial = next(_SERIAL)  # graphs of former weights are not found again
        self._memory: Memory | None = None
        self._attention: dict[tuple, PagedSteps | None] = {}

    def forward(self, x: Tensor, forward_batch) -> Tensor:
        """x [T, H] -> [T, H], the residual stream before and after the layers."""
        if self._faster(x):
            return self.by_graphs(x, forward_batch)
        return single_rank.decoder_layers(self.layers, x, forward_batch)

    def _faster(self, x: Tensor) -> bool:
        if x.dtype is torch.float32 or not 0 < len(x) <= ROWS or not usable():
            return False
        return bool(self._weights())

    def _weights(self) -> list[Layer]:
        """Empty where the library does not read them all."""
        if self._read is None:
            read = [Layer.of(layer) for layer in self.layers]
            self._read = read if all(layer.readable() for layer in read) else []
        return self._read

    def by_graphs(self, x: Tensor, forward_batch) -> Tensor:
        """`forward` by ggml's kernels, which must read all weights; at most ROWS rows."""
        layers = self._weights()
        if self._memory is None:
            self._memory = Memory(layers)
        memory, rows = self._memory, len(x)
        memory.stream.rows(x.shape).copy_(x)
        memory.fill_turns(layers[0].attention.qk_norm_rope.rows, rows)
        if not self._in_one(rows, x.dtype, forward_batch):
            for number in range(len(layers) + 1):
                self._graph(number, rows).run()
                if number < len(layers):
                    self._attend(layers[number].attention, rows, x.dtype, forward_batch)
        return memory.stream.rows(x.shape).to(x.dtype)

    def _in_one(self, rows: int, dtype: torch.dtype, forward_batch) -> bool:
        """All layers in one graph, if the backend's attention can be steps of it."""
        attention = self._planned(rows, dtype, forward_batch)
        if attention is None:
            return False
        library, threads = ik_library.library(), torch.get_num_threads()
        key = ("pass", self._serial, id(attention), threads)
        library.graph(key, lambda: self._build_pass(attention, threads), GRAPH_NODES * (len(self.layers) + 1)).run()
        return True

    def _planned(self, rows: int, dtype: torch.dtype, forward_batch) -> PagedSteps | None:
        """Attention of all layers in the pass that the backend has planned."""
        backend = get_attn_backend()
        key = backend, rows, dtype
        if key not in self._attention:
            steps = getattr(backend, "steps", None)  # other backends than this package's for CPUs have none
            modules = [layer.attention.attn for layer in self._weights()]
            self._attention[key] = steps and steps(modules, rows, dtype)
        attention = self._attention[key]
        return attention if attention is not None and attention.plan(forward_batch) else None

    def _build_pass(self, attention: PagedSteps, threads: int) -> Graph:
        layers, memory, rows, steps = self._weights(), self._memory, attention.rows, Steps(ik_library.library())
        stream = memory.stream.of(steps, layers[0].output.shape[0], rows)
        for number in range(len(layers)):
            stream = self._whole(steps, number, stream, attention)
        return steps.build([stream], memory.between, threads)

    def _whole(self, steps: Steps, number: int, stream, attention: PagedSteps):
        """The residual stream after a layer, from the one before it."""
        layer, memory, rows = self._weights()[number], self._memory, attention.rows
        parts = begin(steps, layer, stream, memory, rows)
        attended = attention.add(steps, number, parts, memory.attended.address)
        steps.end_part(attended)  # gates and the stream have their places
        return end(steps, layer, stream, attended, memory, rows)

    def _attend(self, module: GatedAttention, rows: int, dtype: torch.dtype, forward_batch) -> None:
        sizes = module.qk_norm_rope.sizes
        parts = self._memory.qkv.rows((rows, sum(sizes))).flatten().to(dtype).split([rows * size for size in sizes])
        q, k, v = (part.view(rows, -1, module.head_dim) for part in parts)
        out = get_attn_backend().forward(q.flatten(1), k, v, module.attn, forward_batch)
        self._memory.attended.rows((rows, sizes[0])).copy_(out)

    def _graph(self, number: int, rows: int) -> Graph:
        """What lies before the attention of layer `number`: the end of the layer before, the beginning of this one."""
        library, threads = ik_library.library(), torch.get_num_threads()
        key = ("layers", self._serial, number, rows, threads)
        return library.graph(key, lambda: self._build(Steps(library), number, rows, threads))

    def _build(self, steps: Steps, number: int, rows: int, threads: int) -> Graph:
        layers, memory = self._weights(), self._memory
        outputs, stream = [], memory.stream.of(steps, layers[0].output.shape[0], rows)
        if number > 0:
            before = layers[number - 1]
            stream = end(steps, before, stream, memory.attended.of(steps, before.query_size, rows), memory, rows)
            outputs.append(stream)
        if number < len(layers):
            outputs += begin(steps, layers[number], stream, memory, rows)
        return steps.build(outputs, memory.between, threads)
