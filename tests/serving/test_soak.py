"""The soak script, short, against a real server; and its checks, which must notice what they are for."""

import random

import pytest
from scipy import stats

from scripts.benchmarks.soak.checks import Sample, slope, student, wrong_metrics
from scripts.benchmarks.soak.loop import ARGS, CANARIES, Soak, soak
from scripts.benchmarks.soak.traffic import KINDS
from sglang_step35.bench.workloads import WORKLOADS

MINUTES, PERIODS = 0.75, 3


@pytest.mark.server
def test_mixed_traffic_leaves_nothing_behind(serve):
    found = soak(serve(*ARGS), MINUTES, MINUTES / PERIODS)
    assert found.problems == []
    assert set(found.sent) >= {*KINDS, *WORKLOADS} - {
        "random"
    }  # on a slow machine the last workload may not be reached
    assert found.canaries >= CANARIES * (len(found.samples) or 1)


@pytest.mark.parametrize("freedom", [3, 4, 10, 25])
def test_quantile_of_student(freedom):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.01)


def test_slope_and_its_bounds_are_those_of_scipy():
    chance = random.Random(3)
    times = [0.5 * i for i in range(20)]
    values = [100 + 0.3 * t + chance.gauss(0, 1) for t in times]
    found, expected = slope(times, values), stats.linregress(times, values)
    assert found.value == pytest.approx(expected.slope)
    width = stats.t.ppf(0.975, len(times) - 2) * expected.stderr
    assert (found.low, found.high) == pytest.approx((found.value - width, found.value + width), rel=1e-3)


def samples(growth: float, files: int = 0, threads: int = 0) -> Soak:
    """A soak of 20 minutes in which these grow by the minute; a process's first minutes are steeper."""
    chance = random.Random(4)
    return Soak([
        Sample(t, 1000 + max(0, 5 - t) * -20 + growth * t + chance.gauss(0, 0.5), 50 + files * t, 30 + threads * t)
        for t in range(20)
    ])  # fmt: skip


def test_what_grows_is_noticed_and_what_stays_is_not():
    assert samples(0).growth() == []
    assert "memory" in samples(2).growth()[0]
    assert samples(0, files=1).growth() == ["open files grew from 55 to 69"]
    assert samples(0, threads=1).growth() == ["threads grew from 35 to 49"]


METRICS = """# TYPE a_total counter
a_total{{x="1"}} {}
# TYPE g gauge
g {}
"""


@pytest.mark.parametrize(
    ("before", "after", "wrong"),
    [
        ((1, 5), (2, 3), []),
        ((2, 5), (1, 5), ["counter a_total fell"]),
        ((1, 5), (1, "NaN"), ["metric g is nan"]),
        ((1, 5), (1, "+Inf"), ["metric g is inf"]),
    ],
)
def test_metrics_that_cannot_be_are_noticed(before, after, wrong):
    assert wrong_metrics(METRICS.format(*before), METRICS.format(*after)) == wrong


def test_a_counter_that_went_away_is_noticed():
    assert wrong_metrics(METRICS.format(1, 1), "# TYPE g gauge\ng 1\n") == ["counter a_total is gone"]
