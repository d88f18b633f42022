"""Choosing how many tokens to draft, from measured acceptance and measured cost.

With conditional acceptance a_i of the i-th draft, a round of d drafts commits
E(d) = 1 + a_1 + a_1 a_2 + ... + a_1 .. a_d tokens and costs the seconds C(d) of a verify step of
width d + 1 and a pass of the first d MTP layers. The best depth maximises E(d) / C(d); depth 0 is
plain decoding. Depths that were not timed yet cost what `round_cost` foretells, next to those that
were. Everything here is plain arithmetic on numbers handed in, no clock and no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

from sglang_step35.speculative.round_times import Kind, RoundTimes

_RARELY = 1e-6  # in place of an acceptance of 0


@dataclass(frozen=True)
class AdaptiveSettings:
    """max_depth: MTP layers in use; min_depth: equal to it where the depth is fixed. look_ups: a round of any depth may
    go on with looked-up drafts, which costs what it costs. smoothing: weight of one draft in the running acceptance.

    A depth is measured by `enough` rounds, see `RoundTimes`. Other depths are measured anew as often as the tokens
    that this loses, as far as is known, stay below a share of `regret`, of `regret_of_costs` those below the depth in
    use, which show nothing else, but not within probe_every rounds; the first time `curious` times as soon, and plain
    decoding at once. The first trial of all goes on for first_drafts drafts of the first layer. Measuring is given up
    after `patience` rounds without a time, because the batch keeps changing. gain is the advantage needed to change
    depth, so that noise does not. What the first pass with drafts has to catch up with is to be earned within `horizon`
    rounds. Drafts are given up once they have lost the tokens of `reluctance` plain rounds: the first few are slow and
    say little of how far drafts come true, and to begin again is dear. Where the text is known, and a new batch size's
    rounds alone are not, at once if they would lose more than `doubt` of plain ones.
    """

    max_depth: int
    min_depth: int = 0
    look_ups: bool = False
    smoothing: float = 0.015
    enough: int = 3
    regret: float = 0.01
    regret_of_costs: float = 0.004
    probe_every: int = 16
    first_drafts: int = 12
    curious: int = 4
    patience: int = 12
    gain: float = 0.02
    horizon: int = 128
    reluctance: float = 2.0
    doubt: float = 0.25


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


@dataclass(frozen=True)
class Foretold:
    """What rounds of a batch cost before any is timed, in any unit.

    by_depth: [max_depth + 1]. upkeep: what a round without drafts leaves for a later pass of the MTP layers, whose time
    no round of its depth shows. catch_up: of the first pass with drafts behind so many rounds without that the layers
    have all to compute that they ever read.
    """

    by_depth: Sequence[float]
    upkeep: float = 0.0
    catch_up: float = 0.0

    def corrected(self, factors: Sequence[float]) -> "Foretold":
        """With rounds that cost so many times as much, factors by depth."""
        return replace(self, by_depth=[cost * factor for cost, factor in zip(self.by_depth, factors, strict=True)])


@dataclass
class DepthController:
    """Running estimates for one batch-size bucket, and the depth they lead to.

    entry: seconds a batch pays for each token of one request before any draft, see `entry_cost`. owed: what the batch
    has to catch up with before its next draft, as a share of `Foretold.catch_up`. acceptance: [max_depth] conditional
    rates. times: of rounds by depth, and of those with looked-up drafts, in the unit of the prior.
    """

    settings: AdaptiveSettings
    prior: Foretold
    entry: float = 0.0
    owed: float = 0.0
    acceptance: list[float] = field(init=False)
    depth: int = field(init=False)
    times: RoundTimes = field(init=False)
    _drafts: list[float] = field(init=False)
    _trial: Kind | None = field(init=False)
    _seen: int = field(init=False, default=0)  # rounds of the trial that were timed
    _unmeasured: int = field(init=False, default=0)
    _waited: dict[int, int] = field(init=False)
    _tried: set[int] = field(init=False, default_factory=set)
    _wide: bool = field(init=False, default=False)
    _lost: float = field(init=False, default=0.0)  # by drafts, in plain rounds

    def __post_init__(self):
        self.depth = self.settings.max_depth
        # Whatever pays later, the first rounds show how far drafts come true.
        self.acceptance, self._trial = [0.5] * self.settings.max_depth, (self.depth, False)
        self._drafts = [0.0] * self.settings.max_depth
        self.times = RoundTimes(self.prior.by_depth, enough=self.settings.enough)
        depths = range(self.settings.max_depth + 1)
        # Rounds since each was measured; behind the last depth: the other width at the depth in use.
        self._waited = dict.fromkeys(range(self.settings.min_depth, len(depths) + self.settings.look_ups), 0)

    def follow(self, former: "DepthController") -> None:
        """Begin with what batches of another size have shown: the text stays the same, and so does the machine."""
        if former._drafts[0] >= self.settings.first_drafts:
            self.acceptance, self._trial = list(former.acceptance), None
            self._drafts = [1 / self.settings.smoothing] * self.settings.max_depth
            self._lost = self.settings.reluctance - self.settings.doubt
        self.prior = self.prior.corrected(former.times.corrections())
        self.times = RoundTimes(self.prior.by_depth, former.times.pace, enough=self.settings.enough)
        self._tried = former._tried - {0}

    def observe_round(self, depth: int, seconds: float, wide: bool = False) -> None:
        """Note the time of a round that drafted and verified `depth` tokens; wide: and looked-up ones."""
        if depth < self.settings.min_depth:
            return
        self.times.note((depth, wide), seconds, in_use=(depth, wide) == (self.depth, self._wide))
        self._seen += (depth, wide) == self._trial
        self._wide = wide

    def observe_acceptance(self, offered: list[int], accepted: list[int]) -> None:
        """Per draft position: requests that reached it with a draft, and those it was accepted for."""
        for i, (tries, hits) in enumerate(zip(offered, accepted, strict=True)):
            if tries:
                # The mean, the first guess counting as one draft, until that would be slower than the smoothing.
                self._drafts[i] += tries
                weight = max(1 - (1 - self.settings.smoothing) ** tries, tries / (self._drafts[i] + 1))
                self.acceptance[i] += weight * (hits / tries - self.acceptance[i])

    def next_depth(self) -> int:
        """Depth of the next round: the best one known, now and then one to be measured."""
        if self._trial is not None and not self._found_out():
            self._unmeasured += 1
            if self._unmeasured <= self.settings.patience:
                return self.planned
        self._trial, self._unmeasured = None, 0
        costs = self._costs(with_debts=True)
        rates = self._rates(costs)
        self.depth = self._choose(costs, rates)
        self._waited = {kind: rounds + 1 for kind, rounds in self._waited.items()}
        self._waited[self.depth] = 0
        # A trial spares nothing of what was paid before. Plain rounds that seem to win by that are measured soon.
        beside = rates if self._lost else self._rates(self._costs())
        overdue = {kind: rounds / self._wait(kind, beside) for kind, rounds in self._waited.items()}
        kind = max(overdue, key=overdue.__getitem__)
        return self._probe(kind) if overdue[kind] >= 1 else self.depth

    def _choose(self, costs: list[float], rates: list[float]) -> int:
        """The best depth known, but drafts go on while they have lost little."""
        best = best_depth(self.acceptance, costs, self.depth, self.settings.gain)
        if self.depth == 0:
            return best
        plain, *drafting = rates
        self._lost = max(0.0, self._lost + plain / max(drafting) - 1)
        if best > 0:
            return best
        if self._lost < self.settings.reluctance:
            return best_depth(self.acceptance, [inf, *costs[1:]], self.depth, self.settings.gain)
        self._lost = 0.0
        return 0

    @property
    def planned(self) -> int:
        """What `next_depth` answered last."""
        return self.depth if self._trial is None else self._trial[0]

    def _found_out(self) -> bool:
        """Whether a trial has told what it is for: seconds, and the first one of all, how far drafts come true."""
        first = not self._tried
        return self._seen >= self.settings.enough and (not first or self._drafts[0] >= self.settings.first_drafts)

    def floors(self) -> list[float]:
        """`StopRule.floors`; 0, which never stops, while a depth is measured."""
        last = self.settings.max_depth
        if self._trial is not None:
            return [0.0] * (last - 1)
        cost = self._costs()
        best = max(self._rates(cost))

        def floor(depth: int, end: int) -> float:
            hope = expected_tokens(self.acceptance[depth:], end - depth) - 1
            return best * max(0.0, cost[end] - cost[depth]) / max(hope, _RARELY)

        return [min(floor(depth, end) for end in range(depth + 1, last + 1)) for depth in range(1, last)]

    def look_ups_pay(self, depth: int, tokens: float) -> bool:
        """Whether looked-up drafts that should add `tokens` to a round of this depth are worth its wider verify step.

        As for one more MTP layer: they have to give at least the tokens that rounds give on average for the seconds
        they cost. Where these are not known, the kind of round that is to be measured comes next.
        """
        for wide in (False, True):
            kind = depth, wide
            if not self.times.measured(kind) or (self._trial == kind and self._seen < self.settings.enough):
                return wide
        more = self.times.seconds((depth, True)) - self.times.seconds((depth, False))
        return tokens > max(self._rates(self._costs())) * max(0.0, more)

    def _rates(self, costs: list[float]) -> list[float]:
        """Tokens a second by depth."""
        return [expected_tokens(self.acceptance, d) / cost for d, cost in enumerate(costs)]

    def _costs(self, with_debts: bool = False) -> list[float]:
        """Seconds of rounds of every depth. A deeper one takes no less: where measurements say so, the depth in use is
        the one that is known.

        with_debts: rounds with drafts bear their share of what requests paid to have any, and of what is owed before.
        """
        costs = [self.times.seconds((depth, False)) for depth in range(self.settings.max_depth + 1)]
        for depth in reversed(range(self.depth)):
            costs[depth] = min(costs[depth], costs[depth + 1])
        for depth in range(self.depth, self.settings.max_depth):
            costs[depth + 1] = max(costs[depth], costs[depth + 1])
        costs[0] += self.prior.upkeep * self.times.pace
        if with_debts:
            debt = self.owed * self.prior.catch_up * self.times.pace / self.settings.horizon
            for depth in range(1, len(costs)):
                costs[depth] += debt + self.entry * expected_tokens(self.acceptance, depth)
        return [inf if depth < self.settings.min_depth else cost for depth, cost in enumerate(costs)]

    def _wait(self, kind: int, rates: list[float]) -> float:
        """Rounds from one measurement of a kind of round to the next, where depths have these rates."""
        settings = self.settings
        if kind == 0 and kind not in self._tried:  # what drafting must not lose to is measured first
            return settings.enough
        if kind > settings.max_depth:
            seconds = [self.times.seconds((self.depth, wide)) for wide in (False, True)]
            lost = 1 - min(seconds) / max(seconds)
        else:
            lost = max(0.0, 1 - rates[kind] / rates[self.depth])
        others = len(self._waited) - 1
        share = settings.regret if kind > self.depth else settings.regret_of_costs
        rounds = ((settings.enough + 1) * lost + self._catch_up(kind)) * others / share
        return max(settings.probe_every, rounds if kind in self._tried else rounds / settings.curious)

    def _catch_up(self, kind: int) -> float:
        """Rounds without drafts that take as long as what comes before one of this kind with them."""
        if self.depth or not 0 < kind <= self.settings.max_depth:
            return 0.0
        return self.owed * self.prior.catch_up / self.prior.by_depth[0]

    def _probe(self, kind: int) -> int:
        """Let the next rounds measure another kind of round; returns their depth."""
        self._waited[kind] = 0
        self._tried.add(kind)
        widths = kind > self.settings.max_depth
        self._trial, self._seen = ((self.depth, not self._wide) if widths else (kind, False)), 0
        return self.planned
