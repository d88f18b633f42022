"""Grouped-query attention with query-key norm, per-layer RoPE and window, and a gate on each head."""

from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from sglang_step35.config import AttentionSpec
from sglang_step35.model.product import is_packed, linear
from sglang_step35.model.rotary import QKNormRope, RotaryRows
from sglang_step35.packed import kernel


class GatedAttention(nn.Module):
    """One layer's attention; its sum over ranks is completed by the layer boundary.

    Letters: T tokens, H hidden size, Q query heads and K key/value heads of this rank, D head_dim.
    kv_layer: the layer's number in the KV pool (an MTP layer's differs from its checkpoint number).
    """

    def __init__(
        self,
        spec: AttentionSpec,
        hidden_size: int,
        eps: float,
        rows: RotaryRows,
        kv_layer: int,
        quant_config=None,
        prefix: str = "",
    ):
        super().__init__()
        ranks = get_parallel().attn_tp_size
        self.num_heads = spec.num_heads // ranks
        self.head_dim = spec.head_dim
        kv_heads = max(1, spec.num_kv_heads // ranks)
        shared = dict(bias=False, parallel_group="attn_tp")
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            spec.head_dim,
            spec.num_heads,
            spec.num_kv_heads,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
            **shared,
        )
        self.qk_norm_rope = QKNormRope(spec, self.num_heads, kv_heads, eps, rows)
        # earlier_keys, 511 for a window of 512: SGLang's backends count the keys before the query.
        self.attn = RadixAttention(
            self.num_heads,
            spec.head_dim,
            spec.head_dim**-0.5,
            num_kv_heads=kv_heads,
            layer_id=kv_layer,
            sliding_window_size=spec.earlier_keys,
            prefix=add_prefix("attn", prefix),
        )
        self.g_proj = None
        if spec.head_gate:
            # Never quantised: at most 96 rows, fewer than a block of an FP8 checkpoint.
            self.g_proj = ColumnParallelLinear(
                hidden_size, spec.num_heads, prefix=add_prefix("g_proj", prefix), **shared
            )
        self.o_proj = RowParallelLinear(
            spec.num_heads * spec.head_dim,
            hidden_size,
            reduce_results=False,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
            **shared,
        )

    def forward(self, positions: Tensor, x: Tensor, forward_batch) -> Tensor:
        """positions [T] int64, x [T, H] normed -> [T, H], this rank's part of the sum."""
        qkv, _ = self.qkv_proj(x)
        out = self.attn(*self.qk_norm_rope(positions, qkv), forward_batch)  # [T, Q D]
        if self.g_proj is not None:
            gate, _ = self.g_proj(x)
            out = self.gate_heads(out, gate)
        out, _ = self.o_proj(out)
        return out

    def write_kv(self, x: Tensor, forward_batch) -> None:
        """Write the rows' keys and values, and attend to nothing: x [T, H] normed.

        For attention backends with `write_kv`; the rotary rows are those of the running forward.
        """
        _, k, v = self.qk_norm_rope.heads(self._keys_and_values(x))
        get_attn_backend().write_kv(k, v, self.attn, forward_batch)

    def _keys_and_values(self, x: Tensor) -> Tensor:
        """What the qkv projection, plain or packed, has behind its queries: x [T, H] -> [T, 2 K D]."""
        if is_packed(self.qkv_proj):
            return kernel.linear(x, self.qkv_proj.qweight.rows()[1:])
        return linear(x, self.qkv_proj.weight[self.num_heads * self.head_dim :])

    def gate_heads(self, out: Tensor, gate: Tensor) -> Tensor:
        """Each head's output times the sigmoid of its gate: out [T, Q D], gate [T, Q] -> [T, Q D]."""
        heads = out.view(-1, self.num_heads, self.head_dim)
        return (heads * gate.sigmoid().unsqueeze(-1)).view(out.shape)
