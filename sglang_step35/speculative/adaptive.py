"""Choosing how many tokens to draft, from measured acceptance and measured cost.

With conditional acceptance a_i of the i-th draft, a round of d drafts commits
E(d) = 1 + a_1 + a_1 a_2 + ... + a_1 .. a_d tokens and costs the seconds C(d) of a verify step of
width d + 1 and a pass of the first d MTP layers. The best depth maximises E(d) / C(d); depth 0 is
plain decoding. Everything here is plain arithmetic on numbers handed in, no clock and no tensors.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdaptiveSettings:
    """max_depth: MTP layers in use. smoothing: weight of one draft in the running acceptance.

    A round's cost is the lower quartile of the last `window` rounds of its depth, at least
    `enough` of them: whatever else the machine does only ever adds time.
    A depth is tried again after probe_every rounds without it, twice as many after each try that
    changed nothing, up to probe_at_most; gain is the advantage needed to change depth, so that
    noise does not.
    """

    max_depth: int
    smoothing: float = 0.05
    window: int = 32
    enough: int = 4
    probe_every: int = 16
    probe_at_most: int = 256
    gain: float = 0.03


def expected_tokens(acceptance: list[float], depth: int) -> float:
    """Tokens a round of `depth` drafts commits, the target's own included."""
    total, chain = 1.0, 1.0
    for rate in acceptance[:depth]:
        chain *= rate
        total += chain
    return total


def best_depth(acceptance: list[float], cost: list[float], current: int, gain: float) -> int:
    """Depth with the most tokens per second; `current` unless another gains at least `gain`.

    acceptance: [max_depth] conditional acceptance rates. cost: [max_depth + 1] seconds a round.
    """
    rates = [expected_tokens(acceptance, d) / cost[d] for d in range(len(cost))]
    best = max(range(len(rates)), key=rates.__getitem__)
    return best if rates[best] > rates[current] * (1 + gain) else current


def break_even(tokens: float, round_cost: float, layer_cost: float) -> float:
    """Chance of being accepted at which one more draft pays for itself.

    It adds that chance in tokens for layer_cost seconds; the round gives tokens / round_cost.
    """
    return min(1.0, max(0.0, layer_cost) * tokens / round_cost)


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
        at = min(int(confidence * self.bins), self.bins - 1)
        self._tries[at] = self._tries[at] * self.decay + 1
        self._hits[at] = self._hits[at] * self.decay + accepted

    def table(self) -> list[float]:
        """Chance of acceptance by bin of confidence."""
        prior = self.hope * self.weight
        return [
            (hits + prior) / (tries + self.weight)
            for hits, tries in zip(self._hits, self._tries, strict=True)
        ]


@dataclass
class DepthController:
    """Running estimates for one batch-size bucket, and the depth they lead to."""

    settings: AdaptiveSettings
    depth: int = field(init=False)
    acceptance: list[float] = field(init=False)
    _seconds: list[deque] = field(init=False)
    _idle: int = field(init=False, default=0)
    _wait: int = field(init=False)
    _probing: int = field(init=False, default=0)

    def __post_init__(self):
        self.depth = self.settings.max_depth
        self.acceptance = [0.5] * self.settings.max_depth
        depths = range(self.settings.max_depth + 1)
        self._seconds = [deque(maxlen=self.settings.window) for _ in depths]
        self._wait = self.settings.probe_every

    def observe_round(self, depth: int, seconds: float) -> None:
        """Note the time of a round that drafted and verified `depth` tokens."""
        self._seconds[depth].append(seconds)

    @property
    def cost(self) -> list[float | None]:
        """Seconds of a round by depth; None where too few were seen."""
        enough = self.settings.enough
        return [
            sorted(seen)[len(seen) // 4] if len(seen) >= enough else None for seen in self._seconds
        ]

    def observe_acceptance(self, offered: list[int], accepted: list[int]) -> None:
        """Per draft position: requests that reached it with a draft, and those it was accepted for."""
        for i, (tries, hits) in enumerate(zip(offered, accepted, strict=True)):
            weight = 1 - (1 - self.settings.smoothing) ** tries
            if tries:
                self.acceptance[i] += weight * (hits / tries - self.acceptance[i])

    def next_depth(self) -> int:
        """Depth of the next round: the best one known, now and then a probe of a deeper one."""
        cost = self.cost
        unmeasured = [d for d, seconds in enumerate(cost) if seconds is None]
        if unmeasured:
            return unmeasured[-1]
        if self._probing:
            self._probing -= 1
            if not self._probing:
                self._settle()
            return self.settings.max_depth
        before = self.depth
        self.depth = best_depth(self.acceptance, cost, before, self.settings.gain)
        if self.depth == self.settings.max_depth:
            self._idle, self._wait = 0, self.settings.probe_every
        else:
            self._idle += 1
            if self._idle >= self._wait:
                self._probing, self._idle = 2, 0
        return self.depth

    def thresholds(self) -> list[float]:
        """Per draft: the chance of acceptance below which it does not pay; 0 until measured."""
        cost = self.cost
        if None in cost:
            return [0.0] * self.settings.max_depth
        return [
            break_even(expected_tokens(self.acceptance, d), cost[d], cost[d + 1] - cost[d])
            for d in range(self.settings.max_depth)
        ]

    def _settle(self) -> None:
        """After a probe: wait longer before the next one unless the choice changed."""
        chosen = best_depth(self.acceptance, self.cost, self.depth, self.settings.gain)
        longer = min(2 * self._wait, self.settings.probe_at_most)
        self._wait = longer if chosen == self.depth else self.settings.probe_every
