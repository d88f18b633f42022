"""Zero-centred RMSNorm."""

import math

import torch
from sglang.srt.layers.layernorm import GemmaRMSNorm
from torch import Tensor


class RMSNorm(GemmaRMSNorm):
    """y = x / rms(x) * (1 + weight). Kept: SGLang's fused kernels; replaced: the plain-torch path.

    weight: [D], parameter of the model's dtype. D is the last dimension of the input.
    """

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)
        # (1 + weight) sqrt(D) in float32: in bfloat16 the sum would lose the weight's last bits.
        self.register_buffer("scale", torch.empty(size, dtype=torch.float32), persistent=False)
        # sqrt(D eps): eps as the length of a vector of D entries.
        self.register_buffer("eps_length", torch.empty((), dtype=torch.float32), persistent=False)
        self.refresh_gemma_weight()

    def refresh_gemma_weight(self) -> None:
        """Follow a change of `weight`; SGLang's weight loader calls this."""
        super().refresh_gemma_weight()
        size = len(self.weight)
        self.scale.copy_(self.weight.data).add_(1.0).mul_(math.sqrt(size))
        self.eps_length.fill_(math.sqrt(size * self.variance_epsilon))

    def forward_native(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., D] -> same shape and dtype; with a residual (x + residual normed, x + residual)."""
        if residual is None:
            return rms_norm(x, self.scale, self.eps_length)
        if post_residual_addition is not None:
            residual = residual + post_residual_addition
        residual = x + residual
        return rms_norm(residual, self.scale, self.eps_length), residual


def rms_norm(x: Tensor, scale: Tensor, eps_length: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (1 + weight), computed in float32, in x's dtype.

    x: [..., D]. scale: (1 + weight) sqrt(D), broadcasts to x, float32. eps_length: sqrt(D eps).
    mean(x^2) + eps = hypot(|x|, eps_length)^2 / D, which is four small kernels on a CPU where
    torch.rms_norm is a dozen.
    """
    wide = x.float()
    length = torch.hypot(torch.linalg.vector_norm(wide, dim=-1, keepdim=True), eps_length)
    return (wide / length * scale).to(x.dtype)
