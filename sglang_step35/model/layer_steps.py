"""One decoder layer as steps of ggml's graphs: what lies before its attention and what behind it.

Activations between the steps are float32. Letters: T tokens, H hidden size, D head_dim, k chosen experts of a token,
E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sglang_step35.model.attention import GatedAttention
from sglang_step35.model.decoder import DecoderLayer
from sglang_step35.model.mlp import MLP
from sglang_step35.model.moe import MoE
from sglang_step35.model.norm import RMSNorm
from sglang_step35.model.product import is_packed
from sglang_step35.model.rotary import RotaryRows
from sglang_step35.packed import ik_kernel
from sglang_step35.packed.ggml import GGMLTensor, plain
from sglang_step35.packed.ik_library import FLOAT, SIGMOID
from sglang_step35.packed.ik_steps import Steps

ROWS = 64  # of a pass, at most
RECORD = 2  # bytes at most of an activation in int8, with its share of what belongs to a block


@dataclass(frozen=True)
class Norm:
    """factors: [n] float32, 1 + weight."""

    factors: Tensor
    eps: float

    @classmethod
    def of(cls, module: RMSNorm) -> "Norm":
        return cls(module.weight.data.float() + 1, module.variance_epsilon)

    def of_rows(self, steps: Steps, x):
        """x [n, ..] -> the same shape."""
        return steps.fused_rms_norm(x, steps.floats(self.factors, len(self.factors)), self.eps)


@dataclass(frozen=True)
class Feed:
    """A dense network or a shared expert."""

    gate: GGMLTensor
    up: GGMLTensor
    down: GGMLTensor
    limit: float | None

    @classmethod
    def of(cls, module: MLP) -> "Feed":
        return cls(*matrices(module.gate_up_proj, 2), *matrices(module.down_proj), module.activation.limit)


@dataclass(frozen=True)
class Experts:
    """Routed experts: stacked matrices, the router's [E, H] and its bias [E] float32."""

    router: GGMLTensor
    bias: Tensor | None
    gate: GGMLTensor
    up: GGMLTensor
    down: GGMLTensor

    @classmethod
    def of(cls, module: MoE) -> "Experts":
        experts, router = module.experts, module.router
        if hasattr(experts, "w13_qweight"):
            (gate, up), (down,) = experts.w13_qweight.rows(), experts.w2_qweight.rows()
        else:
            gate, up = (_plain(half) for half in experts.w13_weight.chunk(2, dim=1))
            down = _plain(experts.w2_weight)
        return cls(_plain(router.gate.weight), router.bias, gate, up, down)


@dataclass(frozen=True)
class Layer:
    """What the graphs read of a layer."""

    module: DecoderLayer
    attention_norm: Norm
    ffn_norm: Norm
    q_norm: Norm
    k_norm: Norm
    qkv: tuple[GGMLTensor, ...]
    head_gate: GGMLTensor | None
    output: GGMLTensor
    feed: Feed
    experts: Experts | None

    @classmethod
    def of(cls, module: DecoderLayer) -> "Layer":
        attention, mlp = module.self_attn, module.mlp
        heads = attention.qk_norm_rope
        return cls(
            module,
            *(Norm.of(norm) for norm in (module.input_layernorm, module.post_attention_layernorm)),
            *(Norm.of(norm) for norm in (heads.q_norm, heads.k_norm)),
            matrices(attention.qkv_proj, heads.sizes),
            None if attention.g_proj is None else _plain(attention.g_proj.weight),
            *matrices(attention.o_proj),
            Feed.of(mlp if isinstance(mlp, MLP) else mlp.share_expert),
            None if isinstance(mlp, MLP) else Experts.of(mlp),
        )

    @property
    def attention(self) -> GatedAttention:
        return self.module.self_attn

    @property
    def query_size(self) -> int:
        return self.attention.qk_norm_rope.sizes[0]

    def readable(self) -> bool:
        """Whether ggml's kernels read all of it."""
        matrices = [*self.qkv, self.output, self.feed.gate, self.feed.up, self.feed.down]
        matrices += [] if self.head_gate is None else [self.head_gate]
        experts = self.experts
        return all(map(ik_kernel.reads, matrices)) and (
            experts is None or ik_kernel.reads_experts(experts.gate, experts.up, experts.down)
        )


class Place:
    """float32 memory of at most ROWS rows, which lie without gaps whatever their width."""

    def __init__(self, widest: int):
        self._floats = torch.zeros(ROWS * widest)

    @property
    def address(self) -> int:
        return self._floats.data_ptr()

    def rows(self, shape: Sequence[int]) -> Tensor:
        rows, width = shape
        return self._floats[: rows * width].view(rows, width)

    def of(self, steps: Steps, width: int, rows: int):
        return steps.floats(self._floats, width, rows)


class Memory:
    """What the graphs and attention hand to each other, and what lies between the steps of one graph.

    The system gives memory to rows that were used; most of it is never touched.
    """

    def __init__(self, layers: Sequence[Layer]):
        hidden = layers[0].output.shape[0]
        self.stream = Place(hidden)
        self.qkv = Place(max(sum(layer.attention.qk_norm_rope.sizes) for layer in layers))
        self.attended = Place(max(layer.query_size for layer in layers))
        self.gates = Place(max(layer.attention.num_heads for layer in layers))
        self.turns = {layer.attention.qk_norm_rope.rope: Place(layer.attention.head_dim) for layer in layers}
        self.between = torch.empty(ROWS * max(map(bytes_between, layers)), dtype=torch.uint8)

    def fill_turns(self, positions: RotaryRows, rows: int) -> None:
        """cos and sin of each angle of the running forward's positions, as `Steps.rotate` reads them."""
        for rope, place in self.turns.items():
            turns = place.rows((rows, rope.head_size))[:, : rope.rotary_dim]
            turns.view(rows, -1, 2).copy_(positions.pairs(rope))


def begin(steps: Steps, layer: Layer, stream, memory: Memory, rows: int) -> list:
    """All that attention and the layer's end read: queries, keys and values, one after the other, and the gates."""
    module, rope = layer.attention, layer.attention.qk_norm_rope
    x = layer.attention_norm.of_rows(steps, stream)
    parts = [steps.product(x, part) for part in layer.qkv]
    turns = memory.turns[rope.rope].rows((rows, module.head_dim))
    outputs = []
    for part, norm in zip(parts[:2], (layer.q_norm, layer.k_norm), strict=True):
        heads = steps.reshape_3d(part, module.head_dim, part.contents.ne[0] // module.head_dim, rows)
        outputs.append(steps.rotate(norm.of_rows(steps, heads), turns, rope.rope.rotary_dim))
    outputs.append(parts[2])
    address = memory.qkv.address
    for output, size in zip(outputs, rope.sizes, strict=True):
        output.contents.data = address
        address += FLOAT * rows * size
    if layer.head_gate is not None:
        gates = steps.product(x, layer.head_gate)
        gates.contents.data = memory.gates.address
        outputs.append(gates)
    return outputs


def end(steps: Steps, layer: Layer, stream, attended, memory: Memory, rows: int):
    """The residual stream after a layer whose attention has run, in the place of the stream before it."""
    module, size = layer.attention, layer.query_size
    if layer.head_gate is not None:
        heads = steps.reshape_3d(attended, module.head_dim, module.num_heads, rows)
        gates = steps.reshape_3d(memory.gates.of(steps, module.num_heads, rows), 1, module.num_heads, rows)
        attended = steps.reshape_2d(steps.fused_mul_unary(gates, heads, SIGMOID), size, rows)
    stream = _add(steps, stream, steps.product(attended, layer.output))
    x = layer.ffn_norm.of_rows(steps, stream)
    if layer.experts is not None:
        stream = _add(steps, stream, _routed(steps, layer, x, rows))
    feed = layer.feed
    inner = steps.swiglu(x, feed.gate, feed.up, feed.limit)
    return _add(steps, stream, steps.product(inner, feed.down))


def _routed(steps: Steps, layer: Layer, x, rows: int):
    """The routing rule of `moe.choose_experts`, and the sum of the chosen experts [H, T]."""
    own, spec = layer.experts, layer.module.mlp.router.spec
    experts, (hidden, top_k) = spec.num_experts, (own.down.shape[1], spec.top_k)
    scores = steps.sigmoid(steps.product(x, own.router))
    of_each = steps.reshape_3d(scores, 1, experts, rows)
    biased = scores if own.bias is None else steps.add(scores, steps.floats(own.bias, experts))
    ids = steps.top_k(biased, top_k)
    weights = steps.reshape_2d(steps.get_rows(of_each, ids), top_k, rows)
    if spec.renormalize:
        weights = steps.div(weights, steps.sum_rows(weights))
    weights = steps.reshape_3d(steps.scale(weights, spec.scaling_factor), 1, top_k, rows)
    inner = steps.experts(steps.reshape_3d(x, hidden, 1, rows), ids, own.gate, own.up, spec.limit)
    return steps.mul_multi_add(steps.expert_product(inner, ids, own.down), weights)


def _add(steps: Steps, stream, part):
    """In the stream's place."""
    total = steps.add(stream, part)
    total.contents.data = stream.contents.data
    return total


def bytes_between(layer: Layer) -> int:
    """Of one row, generously: every step's result, in whole lines of the cache."""
    hidden, attention = layer.output.shape[0], sum(layer.attention.qk_norm_rope.sizes)
    widths = 8 * hidden + 4 * attention + 4 * layer.feed.down.shape[1]
    if layer.experts is not None:
        spec = layer.module.mlp.router.spec
        widths += 4 * spec.num_experts + spec.top_k * (hidden + 4 * spec.expert_size + 8)
    return (FLOAT + RECORD) * widths + 64 * 64


def _plain(weight: Tensor) -> GGMLTensor:
    return plain(weight.data)


def matrices(layer: nn.Module, parts=1) -> tuple[GGMLTensor, ...]:
    """The matrices of a linear layer; parts: their number, or the rows of each."""
    if is_packed(layer):
        return tuple(layer.qweight.rows())
    weight = layer.weight.data
    cut = weight.chunk(parts) if isinstance(parts, int) else weight.split(parts)
    return tuple(map(_plain, cut))
