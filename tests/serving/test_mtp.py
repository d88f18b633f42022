"""A running server with MTP: the target's own output, and drafts as good as a full recompute's."""

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from tests.support.checkpoints import CheckpointShape, make_checkpoint
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
from tests.support.reference import load_reference

pytestmark = pytest.mark.server
ARGS = (*NANO_ARGS, *MTP_ARGS, "--dtype", "float32", "--chunked-prefill-size", "64")
# SGLang's own test switch: every few rounds it retracts requests as under a KV shortage.
SHORTAGE = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}


@pytest.fixture(scope="module")
def server(serve):
    return serve(*ARGS)


def mixed_requests():
    """Held-out code, random ids, repeated patterns and one-token prompts."""
    code = prompts()[20:28]
    noise = random_ids(3, 70, seed=3) + random_ids(2, 3, seed=4)
    repeats = [[500, 501, 502] * 30, [77] * 40]
    return code + noise + repeats + [[300], [900, 901]]


@pytest.mark.parametrize("at_once", [1, 16])
def test_greedy_output_is_the_target_models(server, at_once):
    requests = mixed_requests()
    answers = generate_all(server, requests, 48, at_once=at_once)
    assert [a["output_ids"] for a in answers] == [greedy(tuple(ids), 48) for ids in requests]


def test_accepted_drafts_equal_an_offline_loop_that_recomputes_everything(server):
    """Also on the second pass, where the prompts come from the prefix cache."""
    requests = prompts()[30:36]
    expected = []
    for ids in requests:
        _, accepted = reference().speculative_greedy(ids, 40, 3)
        expected.append([accepted.count(i) for i in range(4)])
    for _ in range(2):
        answers = generate_all(server, requests, 40, at_once=3)
        assert [histogram(a) for a in answers] == expected
    assert sum(a["meta_info"]["cached_tokens"] for a in answers) > 200


def test_accept_length_of_held_out_code(server):
    answers = generate_all(server, prompts()[40:60], 48)
    rounds = sum(a["meta_info"]["spec_verify_ct"] for a in answers)
    assert 48 * len(answers) / rounds >= 2.3


def test_logprobs_inside_accepted_runs(server):
    for ids in prompts()[60:63]:
        answer = generate(server, ids, 32, return_logprob=True, logprob_start_len=0)
        assert logprob_error(ids, answer) < 1e-4


def test_top_logprobs_inside_accepted_runs(server):
    ids = prompts()[60]
    answer = generate(server, ids, 24, return_logprob=True, top_logprobs_num=3)
    table = reference().logprobs(torch.tensor(ids + answer["output_ids"]))
    for i, entries in enumerate(answer["meta_info"]["output_top_logprobs"]):
        best = table[len(ids) - 1 + i].topk(3)
        assert [entry[1] for entry in entries] == best.indices.tolist()
        assert [entry[0] for entry in entries] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("penalty", [(0.7, 0.3, 1.0), (0.0, 0.0, 1.3)])
def test_penalties_count_every_token_of_an_accepted_run(server, penalty):
    names = ("frequency_penalty", "presence_penalty", "repetition_penalty")
    for ids in prompts()[64:66]:
        answer = generate(server, ids, 32, **dict(zip(names, penalty)))
        assert answer["output_ids"] == penalised_greedy(ids, 32, *penalty)


def test_lengths_and_stops_inside_a_window(server):
    ids = prompts()[0]
    full = greedy(tuple(ids), 24)
    for count in range(1, 8):
        assert generate(server, ids, count)["output_ids"] == full[:count]
    stop = full[9]
    end = full.index(stop) + 1
    answer = generate(server, ids, 24, stop_token_ids=[stop], ignore_eos=False)
    assert answer["output_ids"] == full[:end]
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"


def test_stop_strings_inside_a_window(server):
    text = generate(server, prompts()[0], 48)["text"]
    for start in range(20, 32):
        stop = text[start : start + 4]
        answer = generate(server, prompts()[0], 48, stop=[stop])
        assert answer["text"] == text[: text.index(stop)]


def test_logit_bias_at_every_position_of_a_window(server):
    ids = prompts()[2]
    banned = greedy(tuple(ids), 12)[3]
    output = []
    for _ in range(24):
        row = reference().logits(torch.tensor(ids + output))[-1].clone()
        row[banned] -= 100
        output.append(row.argmax().item())
    assert generate(server, ids, 24, logit_bias={str(banned): -100.0})["output_ids"] == output


def test_json_schema(server):
    """The nano model likes blanks, which the grammar allows for ever."""
    kinds = {"kind": {"enum": ["alpha", "beta"]}, "done": {"type": "boolean"}}
    schema = {"type": "object", "properties": kinds, "required": list(kinds), "additionalProperties": False}
    text = re.compile(r'\{\s*("kind"\s*:\s*"(alpha|beta)"\s*,\s*"done"\s*:\s*((true|false)\s*\})?)?')
    for answer in generate_all(server, prompts()[:4], 100, json_schema=json.dumps(schema), ignore_eos=False):
        assert text.fullmatch(answer["text"])


def test_structured_output(server):
    pattern = r"[a-z]{3,8}=[0-9]{2,12};"
    for answer in generate_all(server, prompts()[:4], 40, regex=pattern, ignore_eos=False):
        assert re.fullmatch(pattern, answer["text"])


def test_sampled_output_follows_the_target_distribution(server):
    ids, samples = prompts()[1], 1200
    rule = {"temperature": 1.5, "top_k": 3}
    expected = exact_sequences(ids, 1.5, 3, 4)
    answers = generate_all(server, [ids] * (samples // 8), 4, n=8, **rule)
    found = [tuple(a["output_ids"]) for a in itertools.chain.from_iterable(answers)]
    assert len(found) == samples and set(found) <= set(expected)
    statistic, bound = chi_square(found, expected)
    assert statistic < bound


def test_greedy_and_sampled_requests_share_a_batch(server):
    requests = prompts()[:8]
    expected = [greedy(tuple(ids), 32) for ids in requests]
    with ThreadPoolExecutor(16) as pool:
        noise = [pool.submit(generate, server, ids, 32, temperature=1.0) for ids in requests]
        answers = list(pool.map(lambda ids: generate(server, ids, 32), requests))
    assert [a["output_ids"] for a in answers] == expected
    assert all(len(f.result()["output_ids"]) == 32 for f in noise)


def test_a_checkpoint_of_another_shape(serve, tmp_path_factory):
    """9 + 3 layers, window 48, top-1 experts, other head counts, chunks of 32, cache hits."""
    shape = CheckpointShape(window=48, top_k=1, heads=8, sliding_heads=4, kv_groups=4, sliding_kv_groups=4, echo=1.5)
    directory = make_checkpoint(tmp_path_factory.mktemp("shape"), shape, seed=5)
    model = ("--model-path", str(directory), "--device", "cpu", "--max-total-tokens", "16384")
    server = serve(*model, *MTP_ARGS, "--dtype", "float32", "--chunked-prefill-size", "32")
    target = load_reference(directory)
    for ids in [list(range(3, 3 + length)) for length in (1, 49, 130)]:
        tokens, accepted = target.speculative_greedy(ids, 16, 3)
        tokens = tokens[:16]
        table = target.logprobs(torch.tensor(ids + tokens))
        expected = [table[len(ids) - 1 + i, token].item() for i, token in enumerate(tokens)]
        for _ in range(2):
            answer = generate(server, ids, 16, return_logprob=True)
            assert answer["output_ids"] == tokens
            assert histogram(answer) == [accepted.count(i) for i in range(4)]
            found = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
            assert found == pytest.approx(expected, abs=1e-4)
    assert answer["meta_info"]["cached_tokens"] > 100


def test_retractions_and_aborts_leave_the_other_requests_alone(serve):
    """With chunks shorter than what a prefix-cache key looks ahead, mixed with decoding."""
    tiny = ("--chunked-prefill-size", "7", "--enable-mixed-chunk", "--max-running-requests", "8")
    server = serve(*ARGS, *tiny, **SHORTAGE)
    requests = prompts()[100:124]
    with ThreadPoolExecutor(16) as pool:
        kept = [pool.submit(generate, server, ids, 40, rid=f"kept-{i}") for i, ids in enumerate(requests)]
        doomed = [pool.submit(generate, server, ids, 400, rid=f"doomed-{i}") for i, ids in enumerate(requests[:10])]
        for i in range(10):
            server.post("/abort_request", {"rid": f"doomed-{i}"})
        answers = [future.result() for future in kept]
        for i in range(10):
            server.post("/abort_request", {"rid": f"doomed-{i}"})
        for future in doomed:
            future.exception()
    assert [a["output_ids"] for a in answers] == [greedy(tuple(ids), 40) for ids in requests]
    assert "etract" in server.log.read_text()
    assert server.post("/flush_cache", {}).ok  # refused while any request holds KV
