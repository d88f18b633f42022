"""One decoder layer, for the backbone and, with a dense network, for an MTP layer."""

from sglang.srt.layers.layer_boundary import append_stages, declare_attn, declare_ffn
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from sglang_step35.config import LayerSpec, ModelSpec
from sglang_step35.model.attention import GatedAttention
from sglang_step35.model.mlp import MLP
from sglang_step35.model.moe import MoE
from sglang_step35.model.norm import RMSNorm
from sglang_step35.model.rotary import RotaryRows


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), where mlp may be experts.

    SGLang's layer boundaries hold the residual, apply the norms, complete sums over ranks and move
    tokens between the layouts of tensor, expert and data parallelism.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerSpec,
        rows: RotaryRows,
        kv_layer: int,
        next_layer: LayerSpec | None = None,
        quant_config=None,
        prefix: str = "",
    ):
        super().__init__()
        size, eps = spec.hidden_size, spec.rms_norm_eps
        attn_prefix = add_prefix("self_attn", prefix)
        self.self_attn = GatedAttention(layer.attention, size, eps, rows, kv_layer, quant_config, attn_prefix)
        if layer.moe is None:
            mlp_prefix = add_prefix("mlp", prefix)
            self.mlp = MLP(size, layer.dense_size, layer.limit_shared, quant_config, mlp_prefix)
        else:
            self.mlp = MoE(layer, size, quant_config, prefix)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        attn_stage, ffn_stage = stages(layer, next_layer)
        self.attn_boundary, self.ffn_boundary = append_stages(
            (attn_stage, self.input_layernorm), (ffn_stage, self.post_attention_layernorm)
        )

    def forward(self, positions: Tensor, hidden, forward_batch):
        """hidden: the stream of the layer before, [T, H] or SGLang's handle of an unfinished sum."""
        x = self.attn_boundary.prepare(hidden, forward_batch)
        if len(x) > 0:
            x = self.self_attn(positions, x, forward_batch)
        x = self.attn_boundary.finish(x, forward_batch)
        x = self.ffn_boundary.prepare(x, forward_batch)
        return self.ffn_boundary.finish(self.mlp(x), forward_batch)


def stages(layer: LayerSpec, next_layer: LayerSpec | None):
    """What the layer declares to SGLang's layer stack; also asked for layers of other ranks."""
    sparse, next_sparse = (spec is not None and spec.moe is not None for spec in (layer, next_layer))
    return declare_attn(), declare_ffn(sparse=sparse, next_layer_sparse=next_sparse)
