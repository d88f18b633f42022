"""Seconds of rounds, and shares of a pace that moves."""

import pytest

from sglang_step35.speculative.round_times import PLAIN, RoundTimes

DEEP = (1, False)


def noted(times: RoundTimes, kind, seconds, count=3, in_use=False) -> RoundTimes:
    for _ in range(count):
        times.note(kind, seconds, in_use)
    return times


def test_rounds_never_seen_take_their_foretold_share_of_the_pace():
    times = noted(RoundTimes([10, 15]), PLAIN, 0.02, in_use=True)
    assert times.seconds(DEEP) == pytest.approx(0.03)
    assert times.measured(PLAIN) and not times.measured(DEEP)


def test_too_few_rounds_tell_nothing():
    times = noted(RoundTimes([10, 15]), PLAIN, 0.02, count=2, in_use=True)
    assert not times.measured(PLAIN) and times.seconds(PLAIN) == 10


def test_another_kind_is_measured_beside_the_one_in_use():
    """What was foretold counts as one measurement; of the logarithms it is the mean."""
    times = noted(RoundTimes([10, 15]), PLAIN, 0.02, in_use=True)
    noted(times, DEEP, 0.05)
    assert [times.seconds(kind) for kind in (PLAIN, DEEP)] == pytest.approx([0.02, (0.03 * 0.05) ** (1 / 2)])
    noted(times, DEEP, 0.05)
    assert times.seconds(DEEP) == pytest.approx((0.03 * 0.05 * 0.05) ** (1 / 3))
    assert times.corrections() == pytest.approx([1, times.seconds(DEEP) / 0.03])


def test_both_take_twice_as_long_once_the_machine_is_half_as_fast():
    times = noted(RoundTimes([10, 25]), PLAIN, 0.02, in_use=True)
    noted(times, DEEP, 0.05)
    noted(times, PLAIN, 0.04, count=32, in_use=True)
    assert [times.seconds(kind) for kind in (PLAIN, DEEP)] == pytest.approx([0.04, 0.1])
    noted(times, DEEP, 0.1)
    assert times.corrections() == pytest.approx([1, 1]), "as before"


def test_one_bad_measurement_counts_less_the_more_there_were():
    times = noted(RoundTimes([10, 20]), PLAIN, 0.01, in_use=True)
    for _ in range(8):
        noted(times, DEEP, 0.02)
        noted(times, PLAIN, 0.01, count=8, in_use=True)
    noted(times, DEEP, 0.04)
    assert times.corrections()[1] == pytest.approx(2**times.weight)


def test_slow_rounds_do_not_change_the_pace():
    times = noted(RoundTimes([10, 15]), PLAIN, 0.02, count=24, in_use=True)
    noted(times, PLAIN, 60.0, count=8, in_use=True)
    assert times.seconds(PLAIN) == pytest.approx(0.02)


def test_widths_are_kinds_of_their_own():
    times = noted(RoundTimes([10, 15]), DEEP, 0.03, in_use=True)
    noted(times, (1, True), 0.12)
    assert times.seconds((1, True)) == pytest.approx(0.12) and times.seconds(DEEP) == pytest.approx(0.03)
