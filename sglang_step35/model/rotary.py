"""Query-key normalisation and rotary embedding, which every layer applies in this order."""

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.rotary_embedding import get_rope
from torch import Tensor, nn

from sglang_step35.config import AttentionSpec
from sglang_step35.model.norm import RMSNorm, rms_norm

BLOCK_ROWS = 128  # at once: what lies between the steps then stays in a core's cache


class RotaryRows:
    """cos and sin of the positions of the running forward, looked up once for all layers alike.

    The model calls `start` at the beginning of every forward. Letters: T tokens, D head_dim,
    r <= D rotated channels.
    """

    def __init__(self):
        self.positions: Tensor | None = None
        self._rows: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def start(self, positions: Tensor) -> None:
        """positions: [T] int64."""
        self.positions = positions
        self._rows.clear()

    def get(self, rope: nn.Module) -> tuple[Tensor, Tensor]:
        """Factors (own, swapped), each [T, 1, D] float32, of x and of x with its halves swapped."""
        if rope not in self._rows:
            self._rows[rope] = self._look_up(rope)
        return self._rows[rope]

    def pairs(self, rope: nn.Module) -> Tensor:
        """cos and sin of every angle, [T, r / 2, 2] float32."""
        return self._cos_sin(rope).view(len(self.positions), 2, -1).transpose(1, 2)

    def _cos_sin(self, rope: nn.Module) -> Tensor:
        """[T, r] float32, the cosines first."""
        return rope.cos_sin_cache.index_select(0, self.positions).float()

    def _look_up(self, rope: nn.Module) -> tuple[Tensor, Tensor]:
        cos, sin = self._cos_sin(rope).unsqueeze(1).chunk(2, dim=-1)  # [T, 1, r / 2]
        rest = cos.new_zeros(*cos.shape[:2], rope.head_size - rope.rotary_dim)
        return torch.cat((cos, cos, rest + 1), dim=-1), torch.cat((-sin, sin, rest), dim=-1)


class QKNormRope(BaseFusedOp):
    """RMSNorm over each head of q and k, then rotary embedding; v passes through.

    Letters: T tokens, Q query heads and K key/value heads of this rank, D head_dim.
    """

    def __init__(self, spec: AttentionSpec, heads: int, kv_heads: int, eps: float, rows: RotaryRows):
        super().__init__()
        self.head_dim = spec.head_dim
        self.sizes = [heads * spec.head_dim, kv_heads * spec.head_dim, kv_heads * spec.head_dim]
        self.q_norm = RMSNorm(spec.head_dim, eps)
        self.k_norm = RMSNorm(spec.head_dim, eps)
        scaling = spec.rope.scaling
        self.rope = get_rope(
            spec.head_dim,
            rotary_dim=spec.head_dim,
            max_position=spec.rope.max_position,
            base=spec.rope.theta,
            rope_scaling=None if scaling is None else dict(scaling),
            partial_rotary_factor=spec.rope.partial_factor,
        )
        self.rows = rows
        self._scale: Tensor | None = None

    def _torch_compile_forward(self, num_tokens: int):
        # The norms and the rotary embedding switch to compilable code themselves.
        return self.forward_cuda

    def refresh(self) -> None:
        """Follow a change of the norm weights."""
        self._scale = None

    def forward_cuda(self, positions: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """positions [T] int64, qkv [T, (Q + 2 K) D] -> q [T, Q D], k [T, K D], v [T, K D]."""
        q, k, v = qkv.split(self.sizes, dim=-1)
        q = self.q_norm(q.reshape(-1, self.head_dim)).view(q.shape)
        k = self.k_norm(k.reshape(-1, self.head_dim)).view(k.shape)
        q, k = self.rope(positions, q, k)
        return q, k, v

    def forward_native(self, positions: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same on q and k at once; positions are the ones `rows` was started with."""
        q, k, v = self.heads(qkv)
        return q.flatten(1), k.flatten(1), v.flatten(1)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [T, (Q + 2 K) D] -> q [T, Q, D], k [T, K, D], v [T, K, D]; computed in float32.

        Keys and values alone, [T, 2 K D], are a qkv of no query heads.
        """
        heads = qkv.view(len(qkv), -1, self.head_dim)
        k_heads = self.sizes[1] // self.head_dim
        q_heads = heads.shape[1] - 2 * k_heads
        turned = [heads[:, : q_heads + k_heads], *self.rows.get(self.rope)]
        if len(heads) <= BLOCK_ROWS:
            qk = self._turn(*turned)
        else:
            qk = torch.cat([self._turn(*block) for block in zip(*(x.split(BLOCK_ROWS) for x in turned), strict=True)])
        return qk[:, :q_heads], qk[:, q_heads:], heads[:, q_heads + k_heads :]

    def _turn(self, qk: Tensor, own: Tensor, swapped: Tensor) -> Tensor:
        """qk [T, Q + K, D], normed and turned by these factors of `RotaryRows.get`."""
        normed = rms_norm(qk.float(), self._scales()[-qk.shape[1] :], self.q_norm.eps_length)
        return torch.addcmul(normed * own, self._swap_halves(normed), swapped).to(qk.dtype)

    def _scales(self) -> Tensor:
        """[Q + K, D] float32: the scale of q_norm for each query head, of k_norm for each key head."""
        if self._scale is None:
            q_size, k_size, _ = self.sizes
            q = self.q_norm.scale.expand(q_size // self.head_dim, -1)
            self._scale = torch.cat((q, self.k_norm.scale.expand(k_size // self.head_dim, -1)))
        return self._scale

    def _swap_halves(self, x: Tensor) -> Tensor:
        """[..., D]: the halves of the first r channels swapped, the rest in place."""
        half = self.rope.rotary_dim // 2
        if 2 * half == self.head_dim:
            return x.roll(half, dims=-1)
        return torch.cat((x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]), dim=-1)
