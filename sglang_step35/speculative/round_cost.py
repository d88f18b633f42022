"""What a round costs before any was timed: the weights it reads."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from sglang_step35.packed.parameter import PackedParameter


@dataclass(frozen=True)
class RoundCost:
    """Bytes of this rank's weights by part.

    dense: of the backbone without routed experts and embedding, the head included. routed: of all routed experts.
    share: of the experts, what one token chooses. drafts: of each MTP layer, its head included.
    """

    dense: int
    routed: int
    share: float
    drafts: tuple[int, ...]

    @classmethod
    def of(cls, target: nn.Module, mtp: nn.Module, num_steps: int) -> "RoundCost":
        """target, mtp: the models of `model.causal_lm` and `model.mtp`."""
        spec, backbone, layers = target.spec, sizes(target), sizes(mtp)
        routed = sum(size for name, size in backbone.items() if ".experts." in name)
        embedding = 0 if spec.tie_word_embeddings else _under("model.embed_tokens.", backbone)
        head = _under("model.embed_tokens." if spec.tie_word_embeddings else "lm_head.", backbone)
        shares = [layer.moe.top_k / layer.moe.num_experts for layer in spec.layers if layer.moe]
        return cls(
            dense=sum(backbone.values()) - routed - embedding,
            routed=routed,
            share=max(shares, default=0.0),
            drafts=tuple(_under(f"layers.{depth}.", layers) + head for depth in range(num_steps)),
        )

    def by_depth(self, batch: int) -> list[float]:
        """Bytes of a round by drafts, 0 to num_steps: a verify step of batch (d + 1) tokens, which choose their experts
        each on its own, and the first d MTP layers."""
        depths = range(len(self.drafts) + 1)
        return [self.dense + self.routed * self.touched(batch * (d + 1)) + sum(self.drafts[:d]) for d in depths]

    def touched(self, tokens: int) -> float:
        """Share of the experts that at least one of the tokens chooses."""
        return 1 - (1 - self.share) ** tokens


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of every parameter, packed ones included."""
    return {name: _bytes(parameter) for name, parameter in model.named_parameters()}


def _bytes(parameter: nn.Parameter) -> int:
    if isinstance(parameter, PackedParameter):
        return sum(part.nbytes for part in parameter.rows())
    return parameter.nbytes


def _under(prefix: str, sizes: Mapping[str, int]) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(prefix))
