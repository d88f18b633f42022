"""Prometheus counters of drafts by position: what SGLang's own accept length leaves out."""

from collections.abc import Sequence

OFFERED, ACCEPTED = "sglang:spec_offered_drafts", "sglang:spec_accepted_drafts"


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
