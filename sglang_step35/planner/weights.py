"""Weight bytes of a checkpoint, by part and per device, for each quantisation.

One list (`tensors`) answers both questions: how many parameters there are, and what one device holds of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from sglang_step35.config import AttentionSpec, LayerSpec, ModelSpec, MoESpec
from sglang_step35.planner import PlanError

BF16, FP32 = 2, 4  # bytes of an element
BLOCK = 128  # FP8 scales one 128 x 128 block, INT4 one group of 128 inputs
Q4_K, Q6_K = 144 / 256, 210 / 256  # bytes of a weight
REPLICATED = 1

# The published Q4_K_S file, in bytes: a given figure. By `_gguf_bytes` it has no MTP layers.
GGUF_Q4_K_S_BYTES = 111_500_000_000

QUANTIZATIONS = ("bf16", "fp8", "int8", "int4", "gguf")


@dataclass(frozen=True)
class Tensor:
    """Equal matrices of one part of the model.

    max_shards: into how many pieces tensor parallelism can cut it; further devices hold copies.
    copies: how many such matrices (routed experts). element_bytes: bytes of an element when not quantised.
    """

    part: str
    rows: int
    cols: int
    max_shards: int
    copies: int = 1
    element_bytes: int = BF16

    @property
    def elements(self) -> int:
        return self.rows * self.cols * self.copies

    def device_bytes(self, tp: int, quantization: str) -> int:
        """Bytes one of `tp` devices holds. Only routed experts are quantised, the rest stays in bf16; but for GGUF."""
        if quantization == "gguf":
            total = self._gguf_bytes()
        elif self.part == "routed":
            total = self.copies * _quantised_bytes(self.rows, self.cols, quantization)
        else:
            total = self.elements * self.element_bytes
        return total // min(tp, self.max_shards)

    def _gguf_bytes(self) -> int:
        """Of llama.cpp's Q4_K_S: Q4_K, but for the head in Q6_K and norms and routers in float32.

        The few matrices it gives Q5_K add 0.4 % to the published file.
        """
        if self.part in ("norms", "router"):
            return self.elements * FP32
        return int(self.elements * (Q6_K if self.part in ("head", "mtp_heads") else Q4_K))


@dataclass(frozen=True)
class Parts:
    """A figure for each part of a checkpoint: parameters or bytes.

    mtp: the MTP decoder layers without vocabulary matrices. mtp_heads: an output head of its own for every MTP layer,
    as the checkpoint stores it. mtp_embeddings: an input embedding of its own for every MTP layer, as stock SGLang
    allocates; the files have none (their published total of 199.4B parameters has room for the heads only).
    """

    embedding: int
    attention: int
    dense: int
    routed: int
    shared: int
    router: int
    norms: int
    head: int
    mtp: int
    mtp_heads: int
    mtp_embeddings: int

    @property
    def backbone(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self) if not field.name.startswith("mtp"))

    @property
    def shared_vocabulary(self) -> int:
        """Backbone and MTP layers with one embedding and one head for all: what this plug-in holds."""
        return self.backbone + self.mtp

    @property
    def checkpoint(self) -> int:
        """What the published files hold: every MTP layer brings its own head."""
        return self.shared_vocabulary + self.mtp_heads

    @property
    def stock(self) -> int:
        """With stock SGLang's copies: every MTP layer has its own embedding and head."""
        return self.checkpoint + self.mtp_embeddings


def parameters(spec: ModelSpec) -> Parts:
    """Parameters of each part."""
    return _by_part((tensor.part, tensor.elements) for tensor in tensors(spec))


def active_parameters(spec: ModelSpec) -> int:
    """Parameters that take part in one token of the backbone: top-k experts, no embedding (a look-up of one row)."""
    count = parameters(spec)
    shares = {moe.top_k / moe.num_experts for layer in spec.layers if (moe := layer.moe)}
    return count.backbone - count.embedding - count.routed + round(count.routed * max(shares, default=0))


def device_weights(spec: ModelSpec, quantization: str = "bf16", tp: int = 1, mtp: bool = True) -> Parts:
    """Bytes one of `tp` devices holds, with or without the MTP layers.

    Expert parallelism changes who holds which expert, not how many bytes: SGLang asks for ep == tp, and 1/tp of the
    experts weighs what 1/tp of every expert does.
    """
    if quantization not in QUANTIZATIONS:
        raise PlanError(f"--quantization {quantization}: expected one of {', '.join(QUANTIZATIONS)}")
    kept = (tensor for tensor in tensors(spec) if mtp or not tensor.part.startswith("mtp"))
    return _by_part((tensor.part, tensor.device_bytes(tp, quantization)) for tensor in kept)


def tensors(spec: ModelSpec) -> Iterator[Tensor]:
    """Every tensor of a checkpoint, plus the embeddings stock SGLang copies (part mtp_embeddings)."""
    hidden, vocab = spec.hidden_size, spec.vocab_size
    yield Tensor("embedding", vocab, hidden, vocab)
    if not spec.tie_word_embeddings:
        yield Tensor("head", vocab, hidden, vocab)
    yield Tensor("norms", 1, hidden, REPLICATED)  # the final one
    for layer in spec.layers:
        yield from _layer(layer, hidden)
    for layer in spec.mtp_layers:
        # enorm, hnorm and shared_head.norm; then eh_proj, which every device holds whole.
        yield Tensor("mtp", 3, hidden, REPLICATED)
        yield Tensor("mtp", hidden, 2 * hidden, REPLICATED)
        yield from (_as_mtp(tensor) for tensor in _layer(layer, hidden))
        yield Tensor("mtp_heads", vocab, hidden, vocab)
        yield Tensor("mtp_embeddings", vocab, hidden, vocab)


def _layer(layer: LayerSpec, hidden: int) -> Iterator[Tensor]:
    yield Tensor("norms", 2, hidden, REPLICATED)  # input_layernorm, post_attention_layernorm
    yield from _attention(layer.attention, hidden)
    if layer.moe is not None:
        yield from _experts(layer.moe, hidden)
    elif layer.dense_size is not None:
        yield Tensor("dense", 3 * layer.dense_size, hidden, layer.dense_size)  # gate, up, down


def _attention(attention: AttentionSpec, hidden: int) -> Iterator[Tensor]:
    heads, groups, size = attention.num_heads, attention.num_kv_heads, attention.head_dim
    yield Tensor("attention", 2 * heads * size, hidden, heads)  # q_proj, o_proj
    yield Tensor("attention", 2 * groups * size, hidden, groups)  # k_proj, v_proj: whole heads, copied when tp > groups
    if attention.head_gate:
        yield Tensor("attention", heads, hidden, heads)  # g_proj
    yield Tensor("norms", 2, size, REPLICATED)  # q_norm, k_norm


def _experts(moe: MoESpec, hidden: int) -> Iterator[Tensor]:
    # gate and up are [size, hidden], down is [hidden, size]: scale blocks differ where a side is no multiple of 128.
    shards = moe.num_experts * moe.expert_size
    yield Tensor("routed", moe.expert_size, hidden, shards, copies=2 * moe.num_experts)
    yield Tensor("routed", hidden, moe.expert_size, shards, copies=moe.num_experts)
    yield Tensor("shared", 3 * moe.shared_size, hidden, moe.shared_size)
    # This plug-in keeps the gate in float32, twice the checkpoint's size.
    gate_bytes = FP32 if moe.fp32_router else BF16
    yield Tensor("router", moe.num_experts, hidden, REPLICATED, element_bytes=gate_bytes)
    if moe.router_bias:
        yield Tensor("router", 1, moe.num_experts, REPLICATED, element_bytes=FP32)


def _as_mtp(tensor: Tensor) -> Tensor:
    return Tensor("mtp", tensor.rows, tensor.cols, tensor.max_shards, tensor.copies, tensor.element_bytes)


def _quantised_bytes(rows: int, cols: int, quantization: str) -> int:
    """Bytes of one [rows, cols] matrix with its scales."""
    if quantization == "fp8":
        # E4M3, one float32 scale for a block of 128 x 128 (`weight_scale_inv`).
        return rows * cols + -(-rows // BLOCK) * -(-cols // BLOCK) * FP32
    if quantization == "int8":
        return rows * cols + rows * BF16  # one bf16 scale a row
    if quantization == "int4":
        # Symmetric 4 bit, one bf16 scale for a group of 128 inputs.
        return rows * cols // 2 + rows * -(-cols // BLOCK) * BF16
    return rows * cols * BF16


def _by_part(figures: Iterator[tuple[str, int]]) -> Parts:
    sums = {field.name: 0 for field in fields(Parts)}
    for part, figure in figures:
        sums[part] += figure
    return Parts(**sums)
