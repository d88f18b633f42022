"""A running server without speculation against transformers' model, float32."""

import pytest

from sglang_step35.bench.servers import NANO_ARGS
from tests.support.nano_model import generate, generate_all, greedy, logprob_error, prompts, random_ids

pytestmark = pytest.mark.server
ARGS = (*NANO_ARGS, "--dtype", "float32", "--chunked-prefill-size", "32")
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def server(serve):
    return serve(*ARGS)


def long_prompt(length):
    """Held-out code cut to `length` tokens; the window of the nano checkpoint is 64."""
    return [token for ids in prompts() for token in ids][:length]


@pytest.mark.parametrize("length", [1, 2, 31, 33, 63, 64, 65, 300, 1000])
def test_logprobs_below_at_and_past_the_window_in_chunks_of_32(server, length):
    ids = long_prompt(length)
    assert logprob_error(ids, generate(server, ids, 16, **LOGPROBS)) < TOLERANCE


def test_logprobs_after_a_prefix_cache_hit(server):
    shared, tails = random_ids(1, 150, seed=1)[0], random_ids(3, 20, seed=2)
    generate(server, shared, 1)
    for tail in tails:
        answer = generate(server, shared + tail, 16, return_logprob=True)
        assert answer["meta_info"]["cached_tokens"] >= 100
        full = generate(server, shared + tail, 16, **LOGPROBS)
        assert full["output_ids"] == answer["output_ids"] == greedy(tuple(shared + tail), 16)
        assert logprob_error(shared + tail, full) < TOLERANCE


def test_logprobs_in_a_batch_of_mixed_lengths(server):
    requests = [long_prompt(500)[i * 7 : i * 7 + n] for i, n in enumerate((5, 64, 130, 257, 9, 400))]
    for ids, answer in zip(requests, generate_all(server, requests, 16, **LOGPROBS)):
        assert logprob_error(ids, answer) < TOLERANCE


def test_greedy_text_of_20_held_out_prompts(server):
    requests = prompts()[:20]
    answers = generate_all(server, requests, 64)
    assert [a["output_ids"] for a in answers] == [greedy(tuple(ids), 64) for ids in requests]


def test_context_length_is_the_published_one(server):
    import requests

    info = requests.get(f"{server.url}/v1/models", timeout=30).json()
    assert info["data"][0]["max_model_len"] == 262144


def test_a_seed_gives_the_same_sample_again(server):
    ids = prompts()[3]
    outputs = [generate(server, ids, 16, temperature=1.0, sampling_seed=seed)["output_ids"] for seed in (1, 2, 1)]
    assert outputs[0] == outputs[2] != outputs[1]
