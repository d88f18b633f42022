"""What a round costs before any was timed: the weights it reads, and what else takes as long as reading."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import nn

from sglang_step35.packed import int8_rows
from sglang_step35.packed.parameter import PackedParameter


@dataclass(frozen=True)
class Pace:
    """Bytes a device reads meanwhile. product: while it multiplies one row by one weight. layer: while a layer's small
    steps are issued. draft: while a draft is chosen and handed on, besides the layer's and the head's.

    CPUs: fitted to rounds of 1 to 64 rows in docs/real-widths.md; products take about as long in every format. GPUs:
    2 operations at 990 TFLOP/s against 4.8 TB/s, and captured graphs.
    """

    product: float
    layer: float
    draft: float = 0.0


GPU, CPU, CPU_OF_INT8 = Pace(0.01, 0.0), Pace(0.45, 10e6), Pace(0.25, 13e6, 25e6)


def pace_of(device: str) -> Pace:
    """A CPU's depends on whose kernels multiply, the wheel's or those of `packed/int8_rows.py`."""
    if device != "cpu":
        return GPU
    return CPU_OF_INT8 if int8_rows.supported() else CPU


@dataclass(frozen=True)
class Weights:
    """Of some parameters: their number, and the bytes they are kept in."""

    number: float = 0
    bytes: float = 0

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.number + other.number, self.bytes + other.bytes)

    def __sub__(self, other: "Weights") -> "Weights":
        return Weights(self.number - other.number, self.bytes - other.bytes)

    def pass_of(self, rows: float, pace: Pace) -> float:
        """Bytes read, or that would be meanwhile, to multiply all of it by some rows."""
        return self.bytes + pace.product * self.number * rows


@dataclass(frozen=True)
class RoundCost:
    """This rank's weights by part.

    dense: of the backbone without routed experts and embedding, the head included. routed: of all routed experts.
    share: of the experts, what one token chooses. drafts: of each MTP layer. head: that of a draft. layers: of the
    backbone.
    """

    dense: Weights
    routed: Weights
    share: float
    drafts: tuple[Weights, ...]
    head: Weights
    layers: int
    pace: Pace

    @classmethod
    def of(cls, target: nn.Module, mtp: nn.Module, num_steps: int) -> "RoundCost":
        """target, mtp: the models of `model.causal_lm` and `model.mtp`, which shares the other's tables."""
        spec = target.spec
        routed = weights(target, only=".experts.")
        embedding = weights(target, "model.embed_tokens.")
        unread = routed if spec.tie_word_embeddings else routed + embedding
        shares = [layer.moe.top_k / layer.moe.num_experts for layer in spec.layers if layer.moe]
        return cls(
            dense=weights(target) - unread,
            routed=routed,
            share=max(shares, default=0.0),
            drafts=tuple(weights(mtp, f"layers.{depth}.") for depth in range(num_steps)),
            head=weights(mtp.tables.draft_head(0)),
            layers=len(spec.layers),
            pace=pace_of(next(target.parameters()).device.type),
        )

    def by_depth(self, batch: int) -> list[float]:
        """Of a round by drafts, 0 to num_steps: a verify step of batch (d + 1) tokens, which choose their experts each
        on its own. Where there are drafts, also all MTP layers on the rows of the tokens that come true and those
        before them whose KV came from drafts, the first d with their head on one of each request. Without drafts see
        `upkeep`."""
        return [self._verify(batch * (d + 1)) + self._drafts(d, batch) for d in range(len(self.drafts) + 1)]

    def upkeep(self, batch: int, rounds: int) -> float:
        """Of what a plain decode step leaves for a pass of all MTP layers every so many rounds."""
        return self.mtp_pass(batch * rounds) / rounds

    def mtp_pass(self, rows: float) -> float:
        """Of one pass of all MTP layers over so many rows."""
        return sum(layer.pass_of(rows, self.pace) + self.pace.layer for layer in self.drafts)

    def _verify(self, rows: int) -> float:
        chosen = self.routed.number * self.share * rows * self.pace.product
        experts = self.routed.bytes * self.touched(rows) + chosen
        return self.layers * self.pace.layer + self.dense.pass_of(rows, self.pace) + experts

    def _drafts(self, depth: int, batch: int) -> float:
        if not depth:
            return 0.0
        rows = batch * (len(self.drafts) + depth / 2)  # about half of the drafts come true
        return self.mtp_pass(rows) + depth * (self.head.pass_of(batch, self.pace) + self.pace.draft)

    def touched(self, tokens: int) -> float:
        """Share of the experts that at least one of the tokens chooses."""
        return 1 - (1 - self.share) ** tokens


def weights(model: nn.Module, prefix: str = "", only: str = "") -> Weights:
    """Of the parameters whose names begin with `prefix` and hold `only`, packed ones included."""
    found = (p for name, p in model.named_parameters() if name.startswith(prefix) and only in name)
    return sum((Weights(prod(part.shape), part.nbytes) for p in found for part in _parts(p)), Weights())


def _parts(parameter: nn.Parameter) -> Iterator:
    yield from parameter.rows() if isinstance(parameter, PackedParameter) else (parameter,)
