"""Rounds of several plain decode steps: when, that they leave what as many rounds would, and how they are counted."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter

from sglang_step35.speculative.adaptive import Foretold
from sglang_step35.speculative.depth import DepthPlanner
from sglang_step35.speculative.metrics import update_spec_metrics
from sglang_step35.speculative.plain_steps import most_steps
from sglang_step35.speculative.round_times import PLAIN
from sglang_step35.speculative.settings import MTPSettings
from tests.speculative.test_worker_reach import PROMPT, Laggiest
from tests.support.worker_host import Host, make_worker


class Resting(Laggiest):
    """Never drafts, and takes all the steps it may."""

    def plain_steps(self, batch_size, most):
        return most


@pytest.mark.parametrize("sliding", [0, 2000])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_round_takes_as_many_steps_as_it_has_slots(monkeypatch, sliding, steps):
    """The host checks every token against plain decoding, penalties and minimum lengths among them."""
    worker = make_worker(monkeypatch, steps, adaptive=True, sliding=sliding)
    host, worker.depths = Host(worker), Resting(worker.settings)
    options = dict(penalty=(0.4, 0.3, 1.2), min_new_tokens=30), dict(temperature=1.3, seed=5), {}
    live = [host.admit(PROMPT[: 5 + 4 * i], **option) for i, option in enumerate(options)]
    host.prefill({r: len(r.tokens) for r in live})
    for _ in range(12):
        host.round(live)
    resting = [taken for taken in host.steps_taken if taken > 1]
    assert set(resting) == {steps + 1} and len(resting) >= 3 * 11
    for request in live:
        without = len(request.output_ids) - 1 - sum(n * count for n, count in request.histogram.items())
        assert request.spec_verify_ct == without == request.histogram.total()


@pytest.mark.parametrize(
    "remaining, steps",
    [([9], 4), ([3], 3), ([1], 1), ([0], 1), ([1, 9, 9], 1), ([1] + [9] * 7, 4), ([1, 2] + [9] * 7, 2)],
)
def test_few_steps_are_taken_in_vain(remaining, steps):
    """At most an eighth of the requests may be done before the round is."""
    assert most_steps(batch_of(remaining), 4) == steps


@pytest.mark.parametrize("field", ["has_grammar", "return_logprob", "return_hidden_states"])
def test_one_step_where_its_token_is_looked_at(field):
    assert most_steps(batch_of([9], **{field: True}), 4) == 1


def test_one_step_before_custom_logit_processors():
    batch = batch_of([9])
    batch.sampling_info.has_custom_logit_processor = True
    assert most_steps(batch, 4) == 1


def test_one_step_where_the_host_may_not_wait():
    assert most_steps(batch_of([9], seq_lens=torch.empty(1, device="meta")), 4) == 1
    assert most_steps(batch_of([]), 4) == 1


def batch_of(remaining, **changes):
    """What `most_steps` reads of requests that have so many tokens left."""
    params = [SimpleNamespace(max_new_tokens=5 + left) for left in remaining]
    fields = dict(
        reqs=[SimpleNamespace(sampling_params=p, output_ids=[0] * 5) for p in params],
        seq_lens=torch.ones(len(remaining)),
        sampling_info=SimpleNamespace(has_custom_logit_processor=False),
        has_grammar=False,
        return_logprob=False,
        return_hidden_states=False,
    )
    return SimpleNamespace(**fields | changes)


@pytest.mark.parametrize("seconds, steps", [(0.001, 4), (0.03, 3), (0.06, 1), (0.5, 1)])
def test_steps_of_a_round_stay_within_a_tenth_of_a_second(seconds, steps):
    """The cost of a step is what a round took for each."""
    now = [0.0]
    planner = DepthPlanner(MTPSettings(3, adaptive=True), lambda batch: Foretold([1.0] * 4), clock=lambda: now[0])
    assert planner.plain_steps(1, 4) == 1  # not timed yet
    for taken in (1, 1, 3, 4, 4):
        planner.begin_round([0], [0], [[]], taken)
        now[0] += seconds * taken
    assert planner._controller(1).times.seconds(PLAIN) == pytest.approx(seconds)
    assert planner.plain_steps(1, 4) == steps


def test_without_adaptive_depth_a_round_is_one_step():
    planner = DepthPlanner(MTPSettings(3), lambda batch: Foretold([1.0] * 4))
    assert planner.plain_steps(1, 4) == 1


def test_sglangs_accept_length_is_tokens_a_step():
    """Three requests: four plain steps, then a round that accepts five drafts: 20 tokens in 15 steps."""
    fields = "accept_tokens correct_drafts forward_ct block_accept_tokens cap_tokens"
    reporter = SimpleNamespace(**{f"spec_num_{name}": 0 for name in fields.split()})
    stock = getattr(SchedulerMetricsReporter.update_spec_metrics, "__wrapped__", None)
    stock = stock or SchedulerMetricsReporter.update_spec_metrics
    update_spec_metrics(stock, reporter, 3, 0, num_accept_tokens=12, num_cap_tokens=0)
    update_spec_metrics(stock, reporter, 3, 5, num_accept_tokens=8)
    found = reporter.spec_num_accept_tokens, reporter.spec_num_forward_ct, reporter.spec_num_correct_drafts
    assert found == (20, 15, 5)
