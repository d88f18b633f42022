"""How many MTP layers run in a round: the controllers of `adaptive` fed with a clock and the worker's rounds."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from sglang_step35.names import DEPTH_PARAM
from sglang_step35.speculative.adaptive import AdaptiveSettings, DepthController, Foretold
from sglang_step35.speculative.confidence import Calibration, StopRule
from sglang_step35.speculative.entry_cost import EntryCost
from sglang_step35.speculative.ranks import ALONE, Ranks
from sglang_step35.speculative.round_times import PLAIN
from sglang_step35.speculative.settings import MTPSettings

_UNNOTICED = 0.1  # seconds that a token or a new request may wait for tokens of the same round


def depth_limit(req) -> int:
    """Drafts a round that a request allows at most: `custom_params` {"speculative_depth": n}, checked on admission."""
    return (req.sampling_params.custom_params or {}).get(DEPTH_PARAM, sys.maxsize)


Prior = Callable[[int], Foretold]


class DepthPlanner:
    """Adaptive depth and width for the worker: one controller per power of two of batch sizes.

    Without `settings.adaptive` every round drafts num_steps tokens; whether looked-up ones follow is measured
    nevertheless. Of what decides the depth only the seconds and their prior differ between ranks, so rank 0's serve
    all.

    prior: what rounds of a batch size cost before they are timed.
    """

    def __init__(
        self,
        settings: MTPSettings,
        prior: Prior,
        clock: Callable[[], float] = time.perf_counter,
        ranks: Ranks = ALONE,
    ):
        self.settings = settings
        self._prior = cache(prior)  # asked in every round
        self._clock = clock
        self._ranks = ranks
        self._controllers: dict[int, DepthController] = {}
        self._sizes: dict[int, int] = {}  # the batch size that a controller's costs are those of
        self._latest: DepthController | None = None
        self._entry = EntryCost()
        self.calibration = Calibration()
        self._pending: deque[tuple[list[int], list[int], list[list[float]], int]] = deque()
        self._last: tuple[float, int, tuple[int, bool], int] | None = None

    def begin_round(
        self,
        drafted: list[int],
        offered: list[int],
        confidences: list[list[float]],
        steps: int = 1,
    ) -> None:
        """Note the start of a round that verifies offered[b] drafts of each request, drafted[b] of them MTP layers'.

        confidences[b]: the layers' probabilities of theirs; empty where they are unknown. steps: of the target, more
        than one only without drafts.

        The time from one round's start to the next is what a round costs, scheduling included, unless a prefill came
        between.
        """
        if drafted:  # idle batches are not reported back
            self._pending.append((drafted, offered, confidences, steps))
        if not self._measures:
            return
        now, depth, wide = self._clock(), max(drafted, default=0), offered != drafted
        if self._last is not None and self._last[2] == (depth, wide):
            began, size, _, taken = self._last
            self._observe_round(size, depth, (now - began) / taken, wide)
        self._last = (now, len(drafted), (depth, wide), steps)

    def observe(self, accepted: list[int]) -> tuple[list[int], list[int]]:
        """Accepted drafts of each request of the oldest round not yet reported.

        Returns that round's drafts by position: those verification reached, those it accepted.
        """
        drafted, offered, confidences, steps = self._pending.popleft()
        self._entry.add_tokens(sum(accepted) + len(accepted) * steps)
        if not any(offered):
            none = [0] * (self.settings.num_draft_tokens - 1)
            return none, none
        if self._measures:
            reached = _by_position(drafted, accepted, self.settings.num_steps)
            self._controller(len(offered)).observe_acceptance(*reached)
        if self.settings.adaptive:
            for count, kept, chances in zip(drafted, accepted, confidences, strict=True):
                for i in range(min(count, kept + 1, len(chances))):
                    self.calibration.observe(chances[i], kept > i)
        return _by_position(offered, accepted, self.settings.num_draft_tokens - 1)

    @contextmanager
    def entering(self, prompts: int, rows: int) -> Iterator[None]:
        """Time a pass of the MTP layers over the ends of these prompts, rows in all, which goes without while nothing
        is drafted."""
        began = self._clock()
        yield
        if self.settings.adaptive and self.settings.by_slot:
            self._entry.add_pass(prompts, rows, self._ranks.same_number(self._clock() - began))

    def begin_prompts(self, count: int) -> None:
        """So many prompts were prefilled, or 0 where chunks inside some were: the round before is not timed."""
        self._entry.add_prompts(count)
        self._last = None

    def next_depth(self, batch_size: int, owed: float = 0.0) -> int:
        """MTP layers' drafts of the next round; owed: see `DepthController`."""
        if not self._measures:
            return self.settings.num_steps
        controller = self._controller(batch_size)
        controller.entry, controller.owed = batch_size * self._entry.per_token(batch_size), owed
        return controller.next_depth()

    def most_offered(self, batch_size: int) -> int:
        """Drafts of each request that a round verifies at most: those made for a smaller batch may not pay in this."""
        controller = self._controllers.get(_bucket(batch_size))
        return sys.maxsize if controller is None or not self.settings.adaptive else controller.planned

    def rests(self, batch_size: int) -> bool:
        """Whether rounds of such a batch draft nothing; where there was none yet, the last ones of any other size."""
        controller = self._controllers.get(_bucket(batch_size), self._latest)
        return self.settings.adaptive and controller is not None and controller.depth == 0

    def plain_steps(self, batch_size: int, most: int) -> int:
        """Plain steps of a round without drafts, up to `most`: as many as nobody waits for."""
        if most == 1 or not self.settings.adaptive:
            return 1
        times = self._controller(batch_size).times
        return min(most, max(1, int(_UNNOTICED / times.seconds(PLAIN)))) if times.measured(PLAIN) else 1

    def look_ups_pay(self, drafted: list[int], tokens: float) -> bool:
        """Whether the round verifies looked-up drafts that should add `tokens` to each request, their mean."""
        return self._controller(len(drafted)).look_ups_pay(max(drafted), tokens)

    def stop_rule(self, batch_size: int) -> StopRule | None:
        """When the next pass stops early; None at fixed depth."""
        if not self.settings.adaptive:
            return None
        return StopRule(self._controller(batch_size).floors(), self.calibration.table())

    def _observe_round(self, batch_size: int, depth: int, seconds: float, wide: bool) -> None:
        """Note a round's time as that of a batch of the size that the controller began with."""
        controller = self._controller(batch_size)
        began = self._sizes[_bucket(batch_size)]
        seconds *= self._prior(began).by_depth[depth] / self._prior(batch_size).by_depth[depth]
        controller.observe_round(depth, self._ranks.same_number(seconds), wide)

    def _controller(self, batch_size: int) -> DepthController:
        bucket = _bucket(batch_size)
        if bucket not in self._controllers:
            self._sizes[bucket] = batch_size
            steps = self.settings.num_steps
            lowest = 0 if self.settings.adaptive else steps
            settings = AdaptiveSettings(steps, min_depth=lowest, look_ups=self.settings.look_ups > 0)
            prior, same = self._prior(batch_size), self._ranks.same_number
            numbers = Foretold(tuple(map(same, prior.by_depth)), same(prior.upkeep), same(prior.catch_up))
            controller = DepthController(settings, numbers)
            if self._latest is not None:
                controller.follow(self._latest)
            self._controllers[bucket] = controller
        self._latest = self._controllers[bucket]
        return self._latest

    @property
    def _measures(self) -> bool:
        return self.settings.adaptive or self.settings.look_ups > 0


def _bucket(batch_size: int) -> int:
    return max(1, batch_size).bit_length()


def _by_position(offered: list[int], accepted: list[int], count: int) -> tuple[list[int], list[int]]:
    """Of the first `count` positions of a chain: the drafts that verification reached, and those it accepted."""
    pairs = list(zip(offered, accepted, strict=True))
    tries = [sum(o > i and a >= i for o, a in pairs) for i in range(count)]
    return tries, [sum(o > i and a > i for o, a in pairs) for i in range(count)]
