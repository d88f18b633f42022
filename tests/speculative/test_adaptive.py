"""The depth controller as a pure function of what it is told."""

import random

import pytest

from sglang_step35.speculative.adaptive import (
    AdaptiveSettings,
    DepthController,
    Foretold,
    best_depth,
    expected_tokens,
)
from sglang_step35.speculative.confidence import Calibration, StopRule
from sglang_step35.speculative.depth import DepthPlanner
from sglang_step35.speculative.entry_cost import EntryCost
from sglang_step35.speculative.lag import Lag
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.state import LastDrafts

# Seconds of a round by depth: a verify step of 10 ms, 0.5 ms per extra token, 1 ms per MTP layer.
COST = [0.010, 0.0115, 0.013, 0.0145]
PRIOR = Foretold([40, 50, 58, 62])  # bytes: about right


def prior(batch: int) -> Foretold:
    return PRIOR


def costs(controller: DepthController, wide: bool = False) -> list[float | None]:
    """Measured seconds of rounds by depth."""
    kinds = [(depth, wide) for depth in range(controller.settings.max_depth + 1)]
    return [controller.times.seconds(kind) if controller.times.measured(kind) else None for kind in kinds]


def test_expected_tokens_is_the_sum_of_chain_products():
    assert expected_tokens([0.5, 0.5, 0.5], 3) == 1 + 0.5 + 0.25 + 0.125
    assert expected_tokens([0.9], 0) == 1


@pytest.mark.parametrize("acceptance, depth", [([0.9, 0.9, 0.9], 3), ([0.8, 0.1, 0.1], 1), ([0.02, 0.02, 0.02], 0)])
def test_best_depth_has_the_most_tokens_per_second(acceptance, depth):
    rates = [expected_tokens(acceptance, d) / COST[d] for d in range(4)]
    assert best_depth(acceptance, COST, 3, gain=0) == rates.index(max(rates)) == depth


def test_small_advantages_do_not_change_the_depth():
    acceptance = [0.153, 0.0, 0.0]  # depth 1 gains 0.3 % over depth 0
    assert best_depth(acceptance, COST, 0, gain=0) == 1
    assert best_depth(acceptance, COST, 0, gain=0.02) == 0


def test_a_pass_stops_where_its_next_layer_gives_less_than_rounds_give_on_average():
    """Acceptance 0.8 each and 10 ms + 1.5 ms a draft: at best 2.952 tokens in 14.5 ms."""
    controller = DepthController(AdaptiveSettings(max_depth=3), Foretold(COST))
    assert controller.floors() == [0.0, 0.0]  # nothing measured yet
    for depth, seconds in enumerate(COST):
        for _ in range(4):
            controller.observe_round(depth, seconds)
    assert controller.floors() == [0.0, 0.0]  # how far drafts come true is not known yet
    controller.observe_acceptance([12, 10, 8], [10, 8, 6])
    controller.next_depth()
    controller.acceptance = [0.8, 0.8, 0.8]
    rate = (1 + 0.8 + 0.64 + 0.512) / 0.0145
    assert controller.floors() == pytest.approx([rate * 0.0015 / 0.8] * 2)


def test_the_stop_rule_multiplies_the_chances_of_the_drafts_so_far():
    rule = StopRule(floors=[0.5, 0.5], table=[0.1, 0.4, 0.6, 0.9])  # bins of 0.25
    assert not rule.stops([[0.6]])  # 0.6
    assert rule.stops([[0.3]])  # 0.4
    assert not rule.stops([[0.6], [1.0]])  # 0.6 * 0.9
    assert rule.stops([[0.6], [0.7]])  # 0.6 * 0.6
    assert not rule.stops([[0.3, 0.8]])  # a batch counts by its mean, (0.4 + 0.9) / 2
    assert rule.stops([[0.3, 0.1, 0.8]])
    assert rule.stops([[0.9], [0.9], [0.9]])  # no layer left


def test_the_draft_log_keeps_what_each_row_drafted_last():
    log = LastDrafts(pool_size=5)
    log.note([1, 4], [2, 2], [[0.5, 0.25], [0.75, 1.0]])
    log.note([3], [3], [])
    assert log.counts([4, 3, 1, 0]) == [2, 3, 2, 0]
    assert log.confidences([4, 3, 1]) == [[0.25, 1.0], [], [0.5, 0.75]]


def simulate(acceptance, rounds, seed=0, settings=AdaptiveSettings(max_depth=3), noise=0.3, pace=lambda r: 1.0):
    """Drive a controller against a known world; returns it and (tokens, seconds at pace 1)."""
    chance, controller = random.Random(seed), DepthController(settings, PRIOR)
    tokens, seconds = 0, 0.0
    for r in range(rounds):
        rates = acceptance(r) if callable(acceptance) else acceptance
        depth = controller.next_depth()
        accepted = 0
        while accepted < depth and chance.random() < rates[accepted]:
            accepted += 1
        spent = COST[depth] * (1 + noise * chance.expovariate(1))
        controller.observe_round(depth, spent * pace(r))
        offered = [int(i < depth and i <= accepted) for i in range(3)]
        controller.observe_acceptance(offered, [int(i < accepted) for i in range(3)])
        tokens, seconds = tokens + accepted + 1, seconds + spent
    return controller, tokens, seconds


def throughput(acceptance, depth):
    return expected_tokens(acceptance, depth) / COST[depth]


@pytest.mark.parametrize("acceptance", [[0.9, 0.85, 0.8], [0.7, 0.3, 0.2], [0.4, 0.4, 0.4], [0.02, 0.02, 0.02]])
def test_comes_close_to_the_best_fixed_depth(acceptance):
    runs = [simulate(acceptance, 4000, seed)[1:] for seed in range(3)]
    best = max(throughput(acceptance, d) for d in range(4)) / 1.3  # the noise's mean
    assert sum(tokens / seconds for tokens, seconds in runs) / 3 > 0.97 * best


@pytest.mark.parametrize("acceptance", [[0.9, 0.85, 0.8], [0.7, 0.3, 0.2], [0.25, 0.2, 0.2]])
def test_a_machine_whose_pace_moves_is_served_as_well(acceptance):
    """Twice as fast or half as fast within a second, as shared ones are: what was measured then must not mislead."""
    wild = lambda r: 2.0 ** random.Random(r // 37).uniform(-1, 1)
    runs = [simulate(acceptance, 4000, seed, noise=0.1, pace=wild)[1:] for seed in range(4)]
    best = max(throughput(acceptance, d) for d in range(4)) / 1.1
    assert sum(tokens / seconds for tokens, seconds in runs) / 4 > 0.97 * best


def test_a_pass_goes_on_where_two_layers_together_give_enough():
    """The next layer alone costs more than it gives, since it was measured while the machine was slow."""
    controller = DepthController(AdaptiveSettings(max_depth=3), Foretold([40, 50, 70, 62]))
    controller.observe_acceptance([12, 10, 8], [10, 8, 6])
    for _ in range(3):
        controller.observe_round(3, COST[3])
    controller.next_depth()
    controller.acceptance = [0.8, 0.8, 0.8]
    rate = 2.952 / 62
    assert controller.floors() == pytest.approx([rate * 12 / (0.8 + 0.64), 0.0])


@pytest.mark.parametrize("used, costs", [(3, [10, 14, 14, 14]), (1, [10, 20, 20, 20]), (0, [10, 20, 20, 20])])
def test_a_deeper_round_takes_no_less(used, costs):
    """Of two measurements that say so, that of the depth in use counts, since it goes on."""
    controller = DepthController(AdaptiveSettings(max_depth=3), Foretold([10, 20, 16, 14]))
    controller.depth = used
    assert controller._costs() == costs


def test_follows_a_shifting_load():
    def shifting(r):
        return [0.02] * 3 if r < 1500 else [0.9] * 3

    controller, _, _ = simulate(shifting, 1500)
    assert controller.depth == 0
    controller, _, _ = simulate(shifting, 4000)
    assert controller.depth == 3


def test_is_deterministic():
    assert simulate([0.5] * 3, 500)[1:] == simulate([0.5] * 3, 500)[1:]


def test_measuring_other_depths_costs_about_the_share_allowed():
    """Where no draft comes true, every other depth only loses."""
    controller, _, _ = simulate([0.0] * 3, 3000)
    seconds = probes = 0
    for _ in range(2000):
        depth = controller.next_depth()
        probes += depth > 0
        seconds += COST[depth]
        controller.observe_round(depth, COST[depth])
        controller.observe_acceptance([int(depth > 0), 0, 0], [0, 0, 0])
    assert probes > 3 and seconds < 1.012 * 2000 * COST[0]


@pytest.mark.parametrize("entry", [0.0, 0.0059])
def test_depths_below_the_one_in_use_are_measured_more_rarely(entry):
    """Where every draft comes true, they show nothing but what they cost: as much where plain rounds would do nearly as
    well, if prompts had been spared their pass, too."""
    controller, _, _ = simulate([1.0] * 3, 3000)
    controller.entry = entry
    assert 4 / (COST[3] + 4 * entry) == pytest.approx(105 if entry else 276, abs=1)  # plain: 100
    tokens = seconds = probes = 0
    for _ in range(6000):
        depth = controller.next_depth()
        probes, tokens, seconds = probes + (depth < 3), tokens + depth + 1, seconds + COST[depth]
        controller.observe_round(depth, COST[depth])
        controller.observe_acceptance([1] * depth + [0] * (3 - depth), [1] * depth + [0] * (3 - depth))
    assert probes > 9 and tokens / seconds > 0.995 * 4 / COST[3]


def test_slow_rounds_do_not_change_the_cost():
    controller, _, _ = simulate([0.9] * 3, 200, noise=0)
    for _ in range(8):
        controller.observe_round(3, 60.0)
    assert costs(controller)[3] == pytest.approx(COST[3])


def test_lag_widens_the_next_pass_which_is_due_before_the_rings_are_outrun():
    lag = Lag(pool_size=4, num_layers=3, capacity=32, rows=1000)
    lag.clear([1, 2])
    assert lag.rows_needed([1, 2], width=4) == 6
    lag.note([1], width=4)
    assert lag.rows_needed([1], width=4) == lag.rows_needed([1, 2], width=4) == 4 + 4 + 2
    assert lag.rows_needed([2], width=4) == 6
    rounds = 0
    while not lag.is_due([1], width=1, widest=4):
        lag.note([1], width=1)
        rounds += 1
    assert lag.rows_needed([1], width=1) + 4 <= 32 and rounds > 15


@pytest.mark.parametrize("batch, rounds", [(1, 16), (2, 8), (16, 4)])
def test_a_batch_catches_up_when_rows_enough_have_come_together(batch, rounds):
    lag, everybody = Lag(pool_size=16, num_layers=3, capacity=64, rows=16), list(range(batch))
    for _ in range(rounds - 1):
        assert not lag.is_due(everybody, width=1, widest=4)
        lag.note(everybody, width=1)
    assert lag.is_due(everybody, width=1, widest=4) and lag.wait(batch) == rounds


def test_planner_without_adaptation_always_drafts_everything():
    planner = DepthPlanner(MTPSettings(num_steps=3), prior)
    planner.begin_round([3], [3], [[]])
    planner.observe([0])
    assert planner.next_depth(1) == 3
    assert planner.stop_rule(1) is None


def test_a_depth_that_cannot_be_measured_is_not_kept():
    """Where every batch is new, no round is timed: drafting must not stay at a depth under trial."""
    controller = DepthController(AdaptiveSettings(max_depth=3), PRIOR)
    controller.acceptance = [0.1] * 3
    depths = [controller.next_depth() for _ in range(200)]
    assert depths[:12] == [3] * 12
    assert depths.count(0) > 120  # by their bytes
    for _ in range(3):
        controller.observe_round(3, COST[3])
    controller.acceptance = [0.9] * 3
    depths = [controller.next_depth() for _ in range(1000)]
    assert depths.count(3) > 850
    assert costs(controller) == [None, None, None, pytest.approx(COST[3])]


def test_depths_that_were_not_timed_cost_what_their_bytes_foretell():
    """2.952 tokens in 14.5 ms, and 2.44 in 58 / 62 of it: the deepest stays; with half the acceptance it does not."""
    controller = DepthController(AdaptiveSettings(max_depth=3), PRIOR)
    for _ in range(3):
        assert controller.next_depth() == 3
        controller.observe_round(3, COST[3])
        controller.observe_acceptance([4, 3, 3], [3, 3, 2])
    controller.acceptance = [0.8, 0.8, 0.8]
    assert controller.next_depth() == 3
    rate = 2.952 / COST[3]
    assert controller.floors() == pytest.approx([rate * COST[3] / 62 * extra for extra in (12 / (0.8 + 0.64), 4 / 0.8)])
    controller.acceptance = [0.4, 0.4, 0.4]
    rates = [expected_tokens([0.4] * 3, depth) / PRIOR.by_depth[depth] for depth in range(4)]
    assert controller.next_depth() == rates.index(max(rates)) == 1


def test_a_new_batch_size_begins_at_the_depth_that_pays_there():
    """What drafts are worth is known from the batch before; what a round costs, from the bytes it reads."""
    costs = {1: Foretold([10, 11, 12, 13]), 16: Foretold([10, 25, 45, 60])}
    planner = DepthPlanner(MTPSettings(num_steps=3, adaptive=True), costs.__getitem__)
    for _ in range(200):
        planner.begin_round([3], [3], [[]])
        planner.observe([2])
    assert planner.next_depth(1) == 2
    assert planner.next_depth(16) == 0


def test_drafts_made_for_a_smaller_batch_are_offered_only_where_they_pay():
    """One request that drafts three tokens joins fifteen that draft none: verifying its drafts would quadruple rows."""
    costs = {1: Foretold([10, 11, 12, 13]), 16: Foretold([10, 25, 45, 60])}
    planner = DepthPlanner(MTPSettings(num_steps=3, adaptive=True), costs.__getitem__)
    assert planner.most_offered(16) >= 3  # nothing is known of such a batch
    for _ in range(200):
        planner.begin_round([3], [3], [[]])
        planner.observe([2])
    assert [planner.next_depth(1), planner.next_depth(16)] == [2, 0]
    assert [planner.most_offered(1), planner.most_offered(16)] == [2, 0]
    assert DepthPlanner(MTPSettings(num_steps=3), costs.__getitem__).most_offered(16) >= 3


def test_planner_times_rounds_without_a_prefill_behind_them_only():
    now = [0.0]
    planner = DepthPlanner(MTPSettings(num_steps=3, adaptive=True), prior, clock=lambda: now[0])

    def round_of(size, seconds):
        planner.begin_round([3] * size, [3] * size, [[]] * size)
        now[0] += seconds

    round_of(2, 0.02)
    for _ in range(3):
        round_of(1, 0.02)  # the other one has finished
    for prompts in (0, 1, 0):  # a chunk inside a prompt, the end of one
        round_of(1, 5.0)
        planner.begin_prompts(prompts)
    assert costs(planner._controller(1)) == [None, None, None, pytest.approx(0.02)]


def test_calibration_learns_acceptance_not_confidence():
    """Drafts with confidence 0.3 that are accepted 3 times of 4, and sure ones that never are."""
    calibration = Calibration(bins=4)
    assert calibration.table() == [0.9] * 4
    for i in range(400):
        calibration.observe(0.3, i % 4 != 0)
        calibration.observe(1.0, False)
    table = calibration.table()
    assert table[1] == pytest.approx(0.75, abs=0.05)
    assert table[3] < 0.05
    assert table[0] == table[2] == 0.9


def test_planner_calibrates_from_the_drafts_verification_reached():
    planner = DepthPlanner(MTPSettings(num_steps=3, adaptive=True), prior)
    for _ in range(100):
        planner.begin_round([3], [3], [[0.9, 0.6, 0.1]])
        planner.observe([1])
    table = planner.calibration.table()
    assert table[7] > 0.95 and table[4] < 0.1  # the first draft accepted, the second not
    assert table[0] == 0.9  # the third was never reached


def measured(without: float, with_look_ups: float, **settings) -> DepthController:
    """Every depth at COST but the deepest, whose two widths are given."""
    foretold = Foretold([*COST[:3], without])
    controller = DepthController(AdaptiveSettings(max_depth=3, look_ups=True, **settings), foretold)
    for depth, seconds in enumerate([*COST[:3], without]):
        for _ in range(3):
            controller.observe_round(depth, seconds)
    for _ in range(3):
        controller.observe_round(3, with_look_ups, wide=True)
    controller.acceptance = [0.8, 0.8, 0.8]
    return controller


def test_look_ups_pay_where_they_give_more_than_rounds_do_for_the_seconds():
    """2.952 tokens in 14.5 ms; the wider verify step costs 3 ms more, in which rounds give 0.61."""
    controller = measured(0.0145, 0.0175)
    assert controller.look_ups_pay(3, 0.62) and not controller.look_ups_pay(3, 0.60)
    assert measured(0.0145, 0.0140).look_ups_pay(3, 0.01)  # they cost nothing


def test_what_look_ups_cost_is_measured_before_it_is_judged():
    controller = DepthController(AdaptiveSettings(max_depth=3, min_depth=3, look_ups=True), PRIOR)
    assert not controller.look_ups_pay(3, 8.0)  # rounds without come first
    for _ in range(3):
        assert controller.next_depth() == 3
        controller.observe_round(3, 0.01)
    for _ in range(3):
        assert controller.look_ups_pay(3, 0.01)
        controller.observe_round(3, 0.1, wide=True)
    assert not controller.look_ups_pay(3, 1.0)


@pytest.mark.parametrize("wide", [False, True])
def test_the_other_width_is_measured_anew_now_and_then(wide):
    """A machine that was slow while one of them was measured must not decide for ever."""
    controller = measured(0.0145, 0.0175, min_depth=3)
    tokens, measured_anew, seconds = (2.0 if wide else 0.0), 0, {False: 0.02, True: 0.022}
    for _ in range(250):
        assert controller.next_depth() == 3
        if controller.look_ups_pay(3, tokens) is not wide:
            measured_anew += 1
            for _ in range(3):
                controller.observe_round(3, seconds[not wide], wide=not wide)
        controller.observe_round(3, seconds[wide], wide=wide)
    assert 1 <= measured_anew <= 16
    narrow, wider = costs(controller)[3], costs(controller, wide=True)[3]
    assert wider / narrow == pytest.approx(1.1, rel=0.03), "0.0175 / 0.0145 before"


def test_planner_tells_looked_up_drafts_from_the_layers():
    now = [0.0]
    planner = DepthPlanner(MTPSettings(num_steps=3, look_ups=5), prior, clock=lambda: now[0])
    for accepted in [8, 5, 3, 1]:
        planner.begin_round([3], [8], [[]])
        now[0] += 0.03
        tries, hits = planner.observe([accepted])
        assert tries == [1] * min(8, accepted + 1) + [0] * (7 - accepted) and sum(hits) == accepted
    controller = planner._controller(1)
    assert costs(controller, wide=True) == [None, None, None, pytest.approx(0.03)] and costs(controller)[3] is None
    assert controller.acceptance == pytest.approx([4.5 / 5, 3.5 / 5, 3.5 / 4])  # means, and a first guess of 0.5


def test_what_a_round_without_drafts_leaves_for_later_counts():
    """Depth 0 gives 1 token in 10 ms, depth 1 1.4 in 15: better, once the former's upkeep makes it 12 ms."""
    for upkeep, depth in ((0.0, 0), (8.0, 1)):
        settings = AdaptiveSettings(max_depth=1, first_drafts=0, reluctance=0.0)
        controller = DepthController(settings, Foretold([40, 60], upkeep))
        controller.acceptance = [0.4]
        for d, seconds in ((0, 0.010), (1, 0.015)):
            for _ in range(3):
                controller.observe_round(d, seconds)
        assert controller.next_depth() == depth


def test_drafting_bears_its_share_of_what_requests_pay_before_their_first_draft():
    """Depth 1 gives 1.4 tokens in 13 ms, better than one in 10; not with 1 ms for each token before."""
    for entry, depth in ((0.0, 1), (0.0005, 1), (0.001, 0)):
        settings = AdaptiveSettings(max_depth=1, first_drafts=0, reluctance=0.0)
        controller = DepthController(settings, Foretold([40, 52]), entry=entry)
        controller.acceptance = [0.4]
        for d, seconds in ((0, 0.010), (1, 0.013)):
            for _ in range(3):
                controller.observe_round(d, seconds)
        assert controller.next_depth() == depth, entry


def test_drafts_come_back_only_where_they_earn_what_is_owed_within_a_while():
    """Depth 1 gives 1.5 tokens in 12 ms. Catching up takes 200 ms: 128 rounds would have to earn it."""
    for owed, depth in ((0.0, 1), (0.1, 1), (1.0, 1), (5.0, 0)):
        settings = AdaptiveSettings(max_depth=1, first_drafts=0)
        controller = DepthController(settings, Foretold([40, 48], catch_up=800))
        controller.acceptance, controller.depth, controller.owed = [0.5], 0, owed
        for d, seconds in ((0, 0.010), (1, 0.012)):
            for _ in range(3):
                controller.observe_round(d, seconds)
        assert controller.next_depth() == depth, owed


def test_a_hasty_judgement_does_not_end_drafting():
    """Depth 1 gives 1.7 tokens in 15 ms, better than one in 10; the first rounds are slow and their drafts wrong."""
    for wrong, depth in ((4, 1), (40, 0)):
        controller = DepthController(AdaptiveSettings(max_depth=1), Foretold([40, 60]))
        for _ in range(wrong):
            controller.observe_round(1, 0.018)
            controller.observe_acceptance([4], [1])
            controller.next_depth()
        for _ in range(3):  # not enough to come back
            controller.observe_round(controller.planned, 0.010 + 0.005 * controller.planned)
            controller.observe_acceptance([4 * controller.planned], [3 * controller.planned])
            controller.next_depth()
        assert controller.depth == depth, wrong


def test_a_prompts_pass_is_spread_over_the_tokens_that_requests_have():
    """Of 90 and 10 rows, 2 ms each; one request of 256 tokens is supposed. Running ones have yet to show theirs."""
    cost = EntryCost()
    assert cost.per_token(1) == 0
    for _ in range(5):
        cost.add_prompts(2)
        cost.add_pass(0, 60, 0.12)  # a chunk inside
        cost.add_pass(1, 30, 0.06)
        cost.add_pass(1, 10, 0.02)
        cost.add_tokens(100)
    assert cost.per_token(0) == pytest.approx(0.1 * (10 + 1) / (500 + 256))
    assert cost.per_token(4) == pytest.approx(0.1 * (6 + 1) / (500 + 256))
    cost.add_pass(0, 50, 60.0)  # whatever else the machine did
    assert cost.per_token(0) == pytest.approx(0.1 * 11 * 550 / 500 / 756), "its rows count, not its time"
    cost.add_prompts(5)  # without the layers
    assert cost.per_token(0) == pytest.approx(0.1 * 16 * 550 / 500 / 756)
    for _ in range(100):
        cost.add_prompts(1)
        cost.add_tokens(100)
    assert cost.per_token(0) == pytest.approx(0.11 / 100, rel=0.2), "the last requests count"


def test_the_first_prompts_do_not_say_how_many_tokens_requests_have():
    """One token, as a probe asks for: the pass is not borne by that token alone."""
    cost = EntryCost()
    cost.add_prompts(1)
    cost.add_pass(1, 50, 0.1)
    cost.add_tokens(1)
    assert cost.per_token(0) < 0.001


def test_trials_behind_many_rounds_without_drafts_are_as_rare_as_catching_up_is_dear():
    """A trial's first pass costs 60 rounds: not more than about a hundredth of the time goes to such passes."""
    foretold = Foretold([40, 60], catch_up=2400)
    controller = DepthController(AdaptiveSettings(max_depth=1), foretold)
    trials, resting = 0, True
    for _ in range(20_000):
        controller.owed = float(resting)
        depth = controller.next_depth()
        trials, resting = trials + (depth > 0 and resting), depth == 0
        controller.observe_round(depth, 0.010 + 0.005 * depth)
        controller.observe_acceptance([depth], [0])
    assert 2 < trials <= 3 + 20_000 * 0.01 / 60


def test_a_new_batch_size_costs_what_the_one_before_took_for_its_prior():
    """Rounds with drafts take twice what their bytes foretell: as far as that is known, in other batches too."""
    now = [0.0]
    settings = MTPSettings(num_steps=1, adaptive=True)
    planner = DepthPlanner(settings, lambda batch: Foretold([10 * batch, 10 * batch]), clock=lambda: now[0])
    for seconds, depth in ((1.0, 0), (2.0, 1)):
        for _ in range(4):
            planner.begin_round([depth], [depth], [[]])
            now[0] += seconds
    assert planner._controller(4)._costs() == pytest.approx([4.0, 4.0 * 2**0.5])


def test_rounds_of_a_shrinking_batch_count_as_of_the_size_it_had():
    """Fifteen requests down to eight, whose rounds take as long as their share."""
    now = [0.0]
    settings = MTPSettings(num_steps=1, adaptive=True)
    planner = DepthPlanner(settings, lambda batch: Foretold([10 * batch, 12 * batch]), clock=lambda: now[0])
    for size in (15, 12, 10, 8):
        planner.begin_round([1] * size, [1] * size, [[]] * size)
        now[0] += 0.1 * size
    assert costs(planner._controller(15)) == [None, pytest.approx(1.5)]


def test_prompts_go_without_drafts_where_rounds_of_the_batch_to_come_do():
    """One request drafts, sixteen do not: a prompt is drafted for by how many there are, whoever ran last."""
    now = [0.0]
    costs = {1: [1.0, 1.1], 16: [1.0, 9.0]}
    prior = lambda batch: Foretold(costs[1 if batch < 2 else 16])
    planner = DepthPlanner(MTPSettings(num_steps=1, adaptive=True), prior, clock=lambda: now[0])
    assert not planner.rests(1)
    for size in (1, 16):
        depth = 1
        for _ in range(40):
            planner.begin_round([depth] * size, [depth] * size, [[]] * size)
            planner.observe([depth] * size)
            now[0] += costs[size][depth]
            depth = planner.next_depth(size)
    assert [planner.rests(size) for size in (1, 9, 16, 64)] == [False, True, True, True]


def test_a_new_batch_size_makes_its_own_first_trial_where_drafts_are_not_known_yet():
    planner = DepthPlanner(MTPSettings(num_steps=3, adaptive=True), lambda batch: Foretold([10, 20, 30, 40]))
    for rounds, batch, depth in ((5, 16, 3), (7, 64, 0)):
        for _ in range(rounds):
            planner.begin_round([3], [3], [[]])
            planner.observe([0])
        assert planner.next_depth(batch) == depth
