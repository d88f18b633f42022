"""A running server with look-up drafts after MTP's: the same output, and requests that limit their drafts."""

from collections import Counter

import pytest

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from tests.support.nano_model import (
    chi_square,
    exact_sequences,
    generate,
    generate_all,
    greedy,
    histogram,
    logprob_error,
    penalised_greedy,
    prompts,
    random_ids,
    reference,
)
from tests.support.offline_rounds import offline_rounds
from tests.support.plugins import install_plugin

pytestmark = pytest.mark.server
# Room for eight looked-up drafts; the last of two equal flags counts.
ARGS = (*NANO_ARGS, *MTP_ARGS, "--speculative-num-draft-tokens", "12", "--dtype", "float32")
CHUNKS = ("--chunked-prefill-size", "64", "--enable-mixed-chunk")


@pytest.fixture(scope="module")
def server(serve):
    return serve(*ARGS, *CHUNKS)


def requests():
    """Held-out code, on which nano soon repeats itself, noise, patterns, single tokens."""
    return prompts()[:10] + random_ids(2, 70, seed=3) + [[500, 501, 502, 510, 511, 600] * 9, [77] * 40, [300]]


@pytest.mark.parametrize("at_once", [1, 16])
def test_greedy_output_is_the_target_models(server, at_once):
    answers = generate_all(server, requests(), 96, at_once=at_once)
    assert [a["output_ids"] for a in answers] == [greedy(tuple(ids), 96) for ids in requests()]
    looked_up = sum(sum(histogram(a)[4:]) for a in answers)
    # Whether they pay is asked of measured time, and in a batch they seldom do.
    assert looked_up > (10 if at_once == 1 else 0), "rounds that accepted more than MTP drafts"


def test_a_request_may_ask_for_mtp_alone_or_for_no_drafts(server):
    for ids in prompts()[:3]:
        tokens, accepted = reference().speculative_greedy(ids, 64, 3)
        alone = generate(server, ids, 64, custom_params={"speculative_depth": 3})
        assert alone["output_ids"] == tokens[:64]
        assert histogram(alone) == [accepted.count(i) for i in range(4)]
        none = generate(server, ids, 64, custom_params={"speculative_depth": 0})
        assert none["output_ids"] == tokens[:64] and histogram(none)[1:] == [0, 0, 0]


def test_logprobs_and_penalties_inside_wide_windows(server):
    ids = prompts()[7]
    answer = generate(server, ids, 96, return_logprob=True, logprob_start_len=0)
    assert sum(histogram(answer)[4:]) and logprob_error(ids, answer) < 1e-4
    output = generate(server, ids, 32, repetition_penalty=1.02)["output_ids"]
    assert output == penalised_greedy(ids, 32, 0.0, 0.0, 1.02)


def test_sampled_output_follows_the_target(server):
    """A text of one period, so that something is looked up in every round."""
    ids, rule, samples = [77, 78, 79] * 12, {"temperature": 1.0, "top_k": 3}, 1200
    expected = exact_sequences(ids, 1.0, 3, 4)
    answers = generate_all(server, [ids] * (samples // 8), 4, n=8, **rule)
    found = [tuple(a["output_ids"]) for batch in answers for a in batch]
    assert len(found) == samples and set(found) <= set(expected)
    statistic, bound = chi_square(found, expected)
    assert statistic < bound


def test_adaptive_depth_with_look_ups(serve):
    server = serve(*ARGS, *CHUNKS, "--speculative-adaptive")
    answers = generate_all(server, requests(), 96, at_once=4)
    assert [a["output_ids"] for a in answers] == [greedy(tuple(ids), 96) for ids in requests()]


def test_accepted_drafts_are_those_of_an_offline_loop_that_looks_up_too(serve, tmp_path):
    """Wherever something is found it is verified. 11 tokens more, because the last round may draft past the end; one
    request at a time, because a request takes a token without a round where it shares a batch with a prefill."""
    server = serve(*ARGS, *CHUNKS, PYTHONPATH=install_plugin("always_wide_plugin", tmp_path))
    answers = generate_all(server, requests(), 64, at_once=1)
    served = [Counter({n: rounds for n, rounds in enumerate(histogram(a)) if rounds}) for a in answers]
    assert served == [offline_rounds(ids, greedy(tuple(ids), 75), 64, look_ups=8) for ids in requests()]
    assert sum(rounds for found in served for n, rounds in found.items() if n > 3) > 20, "looked-up drafts came true"
