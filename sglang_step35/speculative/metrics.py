"""Prometheus metrics of drafts by position and by cause: what SGLang's own accept length leaves out."""

from collections.abc import Sequence

OFFERED, ACCEPTED = "sglang:spec_offered_drafts", "sglang:spec_accepted_drafts"
CAUSE_ACCEPTED, CAUSE_EXPECTED = "sglang:spec_cause_accepted_drafts", "sglang:spec_cause_expected_drafts"
JUDGED, COLLAPSED, ALARM = "sglang:spec_judged_requests", "sglang:spec_collapsed_requests", "sglang:spec_collapse"


class DraftCounters:
    """Drafts that verification reached, and those it accepted, by position in the chain (1 .. S).

    accepted / offered of a position is its conditional acceptance rate. Served under SGLang's
    /metrics with `--enable-metrics`, as `..._total{model_name, position}`.
    """

    def __init__(self, model_name: str, num_steps: int):
        # SGLang names the folder its processes share before it starts them; importing this
        # library earlier would miss it.
        from prometheus_client import Counter

        labels = ("model_name", "position")
        offered = Counter(OFFERED, "Drafts that verification reached.", labels)
        accepted = Counter(ACCEPTED, "Drafts that verification accepted.", labels)
        self._offered, self._accepted = (
            [counter.labels(model_name, str(i + 1)) for i in range(num_steps)] for counter in (offered, accepted)
        )

    def add(self, offered: Sequence[int], accepted: Sequence[int]) -> None:
        """Add one round's drafts by position."""
        for counter, count in zip(self._offered, offered, strict=True):
            counter.inc(count)
        for counter, count in zip(self._accepted, accepted, strict=True):
            counter.inc(count)


class CauseMetrics:
    """What the watchdog finds: drafts accepted and to be expected, requests judged and collapsed, alarms, by cause.

    Served as `..._total{model_name, cause}` and the gauge `sglang:spec_collapse{model_name, cause}`, 1 in an episode.
    """

    def __init__(self, model_name: str, causes: Sequence[str]):
        from prometheus_client import Counter, Gauge  # as above

        labels = ("model_name", "cause")
        accepted = Counter(CAUSE_ACCEPTED, "MTP drafts accepted in rounds with a cause.", labels)
        expected = Counter(CAUSE_EXPECTED, "MTP drafts that like rounds without the cause would have accepted.", labels)
        judged = Counter(JUDGED, "Requests whose acceptance was judged.", labels)
        collapsed = Counter(COLLAPSED, "Requests that accepted less than half of what like ones do.", labels)
        self._accepted, self._expected, self._judged, self._collapsed = (
            {cause: counter.labels(model_name, cause) for cause in causes}
            for counter in (accepted, expected, judged, collapsed)
        )
        alarm = Gauge(ALARM, "1 while acceptance has collapsed.", labels, multiprocess_mode="mostrecent")
        self._alarm = {cause: alarm.labels(model_name, cause) for cause in causes}
        for gauge in self._alarm.values():
            gauge.set(0)  # "mostrecent" serves what has been set

    def add_drafts(self, cause: str, accepted: int, expected: float) -> None:
        """Add the drafts of one round's requests."""
        self._accepted[cause].inc(accepted)
        self._expected[cause].inc(expected)

    def add_verdict(self, cause: str, collapsed: bool) -> None:
        """Add one request."""
        self._judged[cause].inc()
        self._collapsed[cause].inc(collapsed)

    def set_alarm(self, cause: str, collapsed: bool) -> None:
        """Whether an episode lasts."""
        self._alarm[cause].set(collapsed)


def count_plain_steps(reqs: Sequence, steps: int) -> None:
    """A round takes so many plain steps of these requests: SGLang counts one, and tokens a step are accept lengths."""
    for req in reqs:
        req.spec_verify_ct += steps - 1
        for _ in range(steps - 1):
            req.update_spec_correct_drafts_histogram(0)


def update_spec_metrics(stock, reporter, bs: int, num_correct_drafts: int, num_accept_tokens: int, **more) -> None:
    """around SchedulerMetricsReporter.update_spec_metrics: accept lengths are tokens a step, not a round.

    bs: a round's requests, which SGLang takes for their steps. Every step adds one token that is no draft.
    """
    stock(reporter, num_accept_tokens - num_correct_drafts, num_correct_drafts, num_accept_tokens, **more)
