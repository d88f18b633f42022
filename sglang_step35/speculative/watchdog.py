"""The acceptance watchdog: says when drafts stop coming true, which no answer shows.

Wrong drafts cost speed and nothing else, so a fault in the MTP layers' KV (after a prefix-cache hit, a retraction, a
load from host memory) is silent. Three steps, all of them host arithmetic on numbers that the round has reported:

1. Rounds are kept apart by what may hurt them, their causes; a history holds the acceptance by position, p_i, of the
   rounds with one set of causes.
2. A request is judged once for each of its causes, by the first `drafts` that verification reached, against the history
   most like its rounds but without this cause. Each adds the logarithm of its likelihood ratio between `collapse` * p_i
   and p_i, log(collapse) if it was accepted and log((1 - collapse p_i) / (1 - p_i)) if not; a sum above 0 says
   collapsed. Drafts of one text are not independent, and some texts are harder than others: no bound holds for the
   error, so it is measured, as the share of the history's own requests that this rule calls collapsed.
3. A cause is judged by its requests: q_0 is that share, q_1 = (1 + q_0) / 2 that of a fault, which makes half of the
   sound ones collapse. A cumulative sum (Page 1954) adds the logarithms of their likelihood ratio and never falls below
   0. Without a fault the mean of e^increment is 1, so that, if requests are independent, at least e^h of them go by on
   average before it reaches h (Lorden 1971): h = log(requests_to_false_alarm). With q_0 = 0.1 that takes 9 collapsed
   requests in a row, more with sound ones between. Texts that are all harder than usual look like a fault.

The warning is given once; the episode ends when the sum has come back to 0. Meanwhile rounds with this cause say
nothing about others. Every request is also judged against the history of its own kind (HISTORY): the server's
acceptance against its own past.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Protocol

from sglang_step35.speculative.penalties import PenaltyRule

logger = logging.getLogger(__name__)

Kind = frozenset[str]  # the causes of a round
_SUREST = 0.95  # acceptance that evidence reckons with at most, so that no single draft judges a request

CACHE_HIT, HOST_LOAD, RETRACTION = "cache_hit", "hierarchical_cache", "retraction"
LONG_CONTEXT, SAMPLING, HISTORY = "long_context", "sampling", "history"
RULED = "ruled"  # sets rounds apart and is no cause to be warned of: MTP layers draft what rules then forbid
ADVICE = {
    CACHE_HIT: "send the same prompts to a server with --disable-radix-cache: if more drafts are accepted there, the "
    "MTP layers' KV of cached prefixes is wrong",
    HOST_LOAD: "compare with a server without --enable-hierarchical-cache: if more drafts are accepted there, the MTP "
    "layers' KV is lost on its way through host memory",
    RETRACTION: "avoid retractions (--max-running-requests, --schedule-conservativeness, more KV) and compare",
    LONG_CONTEXT: "compare with parts of the same prompts: if they accept more, look at rope_scaling in config.json",
    SAMPLING: "compare the same prompts at temperature 0; high temperatures accept less",
    HISTORY: "see which requests are new, and what changed on the server: other texts than before look the same",
}
CAUSES = tuple(ADVICE)


@dataclass(frozen=True)
class WatchdogSettings:
    """collapse: the part of the usual acceptance that counts as collapsed. drafts: that judge a request.
    long_context: tokens, from which on a context is long. enough: judged requests of a history before others are
    compared with it. memory: requests after which a history has half forgotten.
    """

    collapse: float = 0.5
    drafts: int = 32
    requests_to_false_alarm: float = 1e6
    long_context: int = 32_768
    enough: int = 16
    memory: int = 2_000


class Report(Protocol):
    """Where figures go: `metrics.CauseMetrics`."""

    def add_drafts(self, cause: str, accepted: int, expected: float) -> None: ...

    def add_verdict(self, cause: str, collapsed: bool) -> None: ...

    def set_alarm(self, cause: str, collapsed: bool) -> None: ...


def causes(req, long_context: int) -> Kind:
    """What may hurt the acceptance of a request's next round."""
    found = set()
    if req.cached_tokens_host + req.cached_tokens_storage:
        found.add(HOST_LOAD)
    elif req.cached_tokens:
        found.add(CACHE_HIT)
    if req.retraction_count:
        found.add(RETRACTION)
    if len(req.origin_input_ids) + len(req.output_ids) >= long_context:
        found.add(LONG_CONTEXT)
    if req.sampling_params.top_k != 1:
        found.add(SAMPLING)
    if req.grammar is not None or req.custom_logit_processor is not None or PenaltyRule.from_request(req) is not None:
        found.add(RULED)
    return frozenset(found)


@dataclass
class History:
    """Acceptance of one kind of rounds by position, and the verdicts on its requests; halved every `memory`."""

    memory: int
    reached: Counter[int] = field(default_factory=Counter)  # position -> drafts that verification reached
    accepted: Counter[int] = field(default_factory=Counter)
    judged: float = 0.0
    collapsed: float = 0.0

    def add(self, drafted: int, accepted: int, requests: int) -> None:
        """Rounds of so many requests that drafted and accepted so many."""
        for position in range(min(drafted, accepted + 1)):
            self.reached[position] += requests
            self.accepted[position] += requests * (position < accepted)

    def add_verdict(self, collapsed: bool) -> None:
        self.judged += 1
        self.collapsed += collapsed
        if self.judged > self.memory:
            self.judged, self.collapsed = self.judged / 2, self.collapsed / 2
            for counts in (self.reached, self.accepted):
                for position in counts:
                    counts[position] //= 2

    def rate(self, position: int) -> float:
        """Chance that a draft is accepted which verification reaches there."""
        return (self.accepted[position] + 1) / (self.reached[position] + 2)

    @property
    def share(self) -> float:
        """Collapsed requests among the judged ones; 0.1 before there are any."""
        return (self.collapsed + 2) / (self.judged + 20)

    def evidence(self, drafted: int, accepted: int, collapse: float) -> float:
        """Logarithm of a round's likelihood if acceptance had collapsed over that if it were as here."""
        evidence = accepted * log(collapse)
        if accepted < drafted:
            rate = min(self.rate(accepted), _SUREST)
            evidence += log((1 - collapse * rate) / (1 - rate))
        return evidence

    def expected(self, drafted: int, accepted: int) -> float:
        """Accepted drafts among as many as verification reached."""
        return sum(map(self.rate, range(min(drafted, accepted + 1))))


@dataclass
class Alarm:
    """One cause's cumulative sum, and the requests of the present run of evidence."""

    evidence: float = 0.0
    on: bool = False
    judged: int = 0
    collapsed: int = 0
    accepted: float = 0.0
    expected: float = 0.0

    def add_drafts(self, accepted: int, expected: float) -> None:
        self.accepted, self.expected = self.accepted + accepted, self.expected + expected

    def add_verdict(self, collapsed: bool, share: float, threshold: float) -> bool:
        """Note a request's verdict; True where an episode begins. share: of collapsed requests without the cause."""
        fault = (1 + share) / 2
        step = log(fault / share) if collapsed else log((1 - fault) / (1 - share))
        self.evidence = min(max(0.0, self.evidence + step), threshold)
        self.judged, self.collapsed = self.judged + 1, self.collapsed + collapsed
        begins = self.evidence >= threshold and not self.on
        self.on = self.evidence > 0 and (self.on or begins)
        if not self.evidence:
            self.judged = self.collapsed = 0
            self.accepted = self.expected = 0.0
        return begins


class Watchdog:
    """Follows every round of a server; on the rank that reports. S: drafts a round at most."""

    def __init__(self, settings: WatchdogSettings = WatchdogSettings(), report: Report | None = None):
        self.settings = settings
        self.report = report
        self.histories: dict[Kind, History] = {}
        self.alarms = {cause: Alarm() for cause in CAUSES}
        self._threshold = log(settings.requests_to_false_alarm)
        self._pending: deque[list[tuple[str, Kind, int]]] = deque()
        # By request and cause: drafts so far, and their evidence.
        self._walks: dict[str, dict[str, tuple[int, float]]] = {}

    def begin_round(self, reqs: Sequence, drafted: Sequence[int]) -> None:
        """A round verifies drafted[b] drafts of the MTP layers for each of these requests of SGLang's."""
        if reqs:  # idle batches are not reported back
            rows = zip(reqs, drafted, strict=True) if any(drafted) else ()
            self._pending.append([(r.rid, causes(r, self.settings.long_context), d) for r, d in rows])

    def observe(self, accepted: Sequence[int]) -> None:
        """Accepted drafts, looked-up ones included, of each request of the oldest round not yet reported."""
        round_ = self._pending.popleft()
        if not round_:  # nothing was drafted
            return
        self._walks = {rid: self._walks.get(rid, {}) for rid, _, _ in round_}
        rows = [(rid, (kind, d, min(d, kept))) for (rid, kind, d), kept in zip(round_, accepted, strict=True) if d]
        numbers = Counter(outcome for _, outcome in rows)
        references = {kind: list(self._references(kind)) for kind, _, _ in numbers}
        steps = {
            (kind, drafted, kept): self._compare(drafted, kept, number, references[kind])
            for (kind, drafted, kept), number in numbers.items()
        }
        for rid, outcome in rows:
            for cause, reference, reached, evidence in steps[outcome]:
                seen, total = self._walks[rid].get(cause, (0, 0.0))
                if seen < self.settings.drafts:
                    seen, total = self._walks[rid][cause] = seen + reached, total + evidence
                    if seen >= self.settings.drafts:
                        self._judge(cause, total > 0, reference)
        for (kind, drafted, kept), number in numbers.items():
            self.histories[kind].add(drafted, kept, number)

    def _references(self, kind: Kind) -> Iterator[tuple[str, History]]:
        """The histories that rounds of a kind are compared with, each with the cause this says something about.

        For a cause that of rounds without it whose other causes are most like these, once it is known well enough.
        """
        suspects = kind - {RULED}
        alarms = {cause for cause in suspects if self.alarms[cause].on}
        own = self.histories.setdefault(kind, History(self.settings.memory))
        if not alarms:
            yield HISTORY, own
        known = [(k, h) for k, h in self.histories.items() if h.judged >= self.settings.enough]
        for cause in suspects:
            others = kind - {cause}
            alike = [(len(k ^ others), -h.judged, h) for k, h in known if cause not in k]
            if alike and not alarms & others:
                yield cause, min(alike, key=lambda entry: entry[:2])[2]

    def _compare(
        self, drafted: int, kept: int, number: int, references: list[tuple[str, History]]
    ) -> list[tuple[str, History, int, float]]:
        """The references, each with the drafts such a round reached and its evidence of a collapse; figures noted."""
        found = []
        for cause, reference in references:
            expected = reference.expected(drafted, kept) * number
            self.alarms[cause].add_drafts(kept * number, expected)
            if self.report is not None:
                self.report.add_drafts(cause, kept * number, expected)
            evidence = reference.evidence(drafted, kept, self.settings.collapse)
            found.append((cause, reference, min(drafted, kept + 1), evidence))
        return found

    def _judge(self, cause: str, collapsed: bool, reference: History) -> None:
        """A request's verdict counts for the cause."""
        alarm = self.alarms[cause]
        begins = alarm.add_verdict(collapsed, reference.share, self._threshold)
        if cause == HISTORY:
            reference.add_verdict(collapsed)
        if self.report is not None:
            self.report.add_verdict(cause, collapsed)
            self.report.set_alarm(cause, alarm.on)
        if begins:
            _warn(cause, alarm)


def _warn(cause: str, alarm: Alarm) -> None:
    logger.warning(
        "acceptance of MTP drafts has collapsed (%s): %.0f accepted where %.0f are usual, about half or less in %d of "
        "%d requests. Answers stay exact, only slower. To find out why: %s. Said once until it recovers.",
        cause, alarm.accepted, alarm.expected, alarm.collapsed, alarm.judged, ADVICE[cause],
    )  # fmt: skip
