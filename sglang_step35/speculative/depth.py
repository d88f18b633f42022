"""How many MTP layers run in a round: the controllers of `adaptive` fed with a clock and the worker's rounds."""

import time
from collections import deque

from sglang_step35.speculative.adaptive import (
    AdaptiveSettings,
    Calibration,
    DepthController,
    StopRule,
)
from sglang_step35.speculative.ranks import ALONE, Ranks
from sglang_step35.speculative.settings import MTPSettings


class DepthPlanner:
    """Adaptive depth for the worker: one controller per power of two of batch sizes.

    Without `settings.adaptive` every round drafts num_steps tokens. Of what decides the depth only the seconds differ
    between ranks, so rank 0's clock serves all.
    """

    def __init__(self, settings: MTPSettings, clock=time.perf_counter, ranks: Ranks = ALONE):
        self.settings = settings
        self._clock = clock
        self._ranks = ranks
        self._controllers: dict[int, DepthController] = {}
        self.calibration = Calibration()
        self._pending: deque[tuple[list[int], list[list[float]]]] = deque()
        self._last: tuple[float, frozenset, int] | None = None

    def begin_round(self, rids: tuple[str, ...], offered: list[int], confidences: list[list[float]]) -> None:
        """Note the start of a round that verifies offered[b] drafts of each request.

        confidences[b]: the layers' probabilities of those drafts; empty where they are unknown.

        The time from one round's start to the next is what a round costs, scheduling included,
        unless requests joined, whose prefill it would include.
        """
        if rids:  # idle batches are not reported back
            self._pending.append((offered, confidences))
        if not self.settings.adaptive:
            return
        now, depth = self._clock(), max(offered, default=0)
        if self._last is not None and self._last[1].issuperset(rids) and self._last[2] == depth:
            seconds = self._ranks.same_number(now - self._last[0])
            self._controller(len(rids)).observe_round(depth, seconds)
        self._last = (now, frozenset(rids), depth)

    def observe(self, accepted: list[int]) -> tuple[list[int], list[int]]:
        """Accepted drafts of each request of the oldest round not yet reported.

        Returns that round's drafts by position: those verification reached, those it accepted.
        """
        offered, confidences = self._pending.popleft()
        pairs = list(zip(offered, accepted, strict=True))
        positions = range(self.settings.num_steps)
        tries = [sum(o > i and a >= i for o, a in pairs) for i in positions]
        hits = [sum(o > i and a > i for o, a in pairs) for i in positions]
        if self.settings.adaptive:
            self._controller(len(offered)).observe_acceptance(tries, hits)
            for (count, kept), chances in zip(pairs, confidences, strict=True):
                for i in range(min(count, kept + 1, len(chances))):
                    self.calibration.observe(chances[i], kept > i)
        return tries, hits

    def next_depth(self, batch_size: int) -> int:
        """Drafts of the next round."""
        if not self.settings.adaptive:
            return self.settings.num_steps
        return self._controller(batch_size).next_depth()

    def stop_rule(self, batch_size: int) -> StopRule | None:
        """When the next pass stops early; None at fixed depth."""
        if not self.settings.adaptive:
            return None
        return StopRule(self._controller(batch_size).floors(), self.calibration.table())

    def _controller(self, batch_size: int) -> DepthController:
        bucket = max(1, batch_size).bit_length()
        if bucket not in self._controllers:
            settings = AdaptiveSettings(max_depth=self.settings.num_steps)
            self._controllers[bucket] = DepthController(settings)
        return self._controllers[bucket]
