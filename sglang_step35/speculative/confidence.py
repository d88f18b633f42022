"""Whether a draft pass goes on to its next layer: what the layers' own confidence in their drafts is worth."""

from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True)
class StopRule:
    """Whether a draft pass goes on to its next layer, from the drafts it has so far.

    The next layer adds the chance that all drafts before it and its own come true, in tokens, for
    the seconds it costs. A round should spend seconds only where they give at least the tokens
    that rounds give on average.

    floors: [S - 1], per finished layer the chance of all drafts so far below which the next layer
    does not pay. table: chance of acceptance by equal bins of a layer's confidence in its draft.
    """

    floors: list[float]
    table: list[float]

    def stops(self, confidences: list[list[float]]) -> bool:
        """confidences[layer][b]: the probability a finished layer gave its draft for request b.

        A layer runs for the whole batch at one price, so what counts is the mean chance of its
        requests: one request's drafting ends with its batch's, since leaving it out alone would
        save nothing.
        """
        finished = len(confidences)
        if finished > len(self.floors):
            return True
        chances = [prod(map(self._chance, drafts)) for drafts in zip(*confidences, strict=True)]
        return sum(chances) < self.floors[finished - 1] * len(chances)

    def _chance(self, confidence: float) -> float:
        return self.table[Calibration.bin(confidence, len(self.table))]


@dataclass
class Calibration:
    """Measured acceptance of drafts by the MTP layer's own confidence in them.

    A layer's probability of its draft is not its chance of acceptance: a greedy target accepts
    every draft that ranks first, however flat the distribution. Bins over [0, 1]; a bin without
    experience counts as `hope`, so that its drafts get a trial. Old experience fades by `decay`.
    """

    bins: int = 8
    hope: float = 0.9
    weight: float = 4.0
    decay: float = 0.99
    _tries: list[float] = field(init=False)
    _hits: list[float] = field(init=False)

    def __post_init__(self):
        self._tries = [0.0] * self.bins
        self._hits = [0.0] * self.bins

    def observe(self, confidence: float, accepted: bool) -> None:
        """Note one draft that verification reached."""
        at = self.bin(confidence, self.bins)
        self._tries[at] = self._tries[at] * self.decay + 1
        self._hits[at] = self._hits[at] * self.decay + accepted

    @staticmethod
    def bin(confidence: float, bins: int) -> int:
        """The bin of a confidence in [0, 1]."""
        return min(int(confidence * bins), bins - 1)

    def table(self) -> list[float]:
        """Chance of acceptance by bin of confidence."""
        prior = self.hope * self.weight
        return [(hits + prior) / (tries + self.weight) for hits, tries in zip(self._hits, self._tries, strict=True)]
