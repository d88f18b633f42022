"""A running server with MTP in the scheduler's other modes: overlap, seeds, fewer layers, adaptive depth, shortage."""

import itertools
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

import pytest

from tests.serving import test_guards
from tests.serving.test_mtp import ARGS
from tests.support.cache_fuzz import SMALL_ARGS
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.nano_model import (
    chi_square,
    exact_sequences,
    generate,
    generate_all,
    greedy,
    histogram,
    penalised_greedy,
    prompts,
    reference,
)
from tests.support.plugins import install_plugin
from tests.support.reference import load_reference

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def overlapped(serve, tmp_path_factory):
    """With overlap scheduling, as on CUDA, and one more of SGLang's plug-ins to allow it on a CPU."""
    directory = tmp_path_factory.mktemp("plugin")
    server = serve(*ARGS, PYTHONPATH=install_plugin("overlap_plugin", directory))
    assert "Overlap schedule is not implemented" not in server.log.read_text()
    return server


@pytest.mark.parametrize("at_once", [1, 16])
def test_with_overlap_greedy_output_is_the_target_models(overlapped, at_once):
    wanted = prompts()[20:32]
    answers = generate_all(overlapped, wanted, 40, at_once=at_once)
    assert [a["output_ids"] for a in answers] == [greedy(tuple(ids), 40) for ids in wanted]


def test_with_overlap_the_drafts_equal_an_offline_loop(overlapped):
    for _ in range(2):
        for ids in prompts()[30:33]:
            _, accepted = reference().speculative_greedy(ids, 40, 3)
            assert histogram(generate(overlapped, ids, 40)) == [accepted.count(i) for i in range(4)]


def test_with_overlap_penalties_and_grammars_see_every_token(overlapped):
    for ids in prompts()[64:66]:
        answer = generate(overlapped, ids, 32, frequency_penalty=0.7, presence_penalty=0.3)
        assert answer["output_ids"] == penalised_greedy(ids, 32, 0.7, 0.3, 1.0)
    pattern = r"[a-z]{3,8}=[0-9]{2,12};"
    for answer in generate_all(overlapped, prompts()[:4], 40, regex=pattern, ignore_eos=False):
        assert re.fullmatch(pattern, answer["text"])


def test_with_overlap_guards_see_every_token(overlapped):
    for name, (guards, _) in test_guards.GUARDS.items():
        wanted = test_guards.requests()
        for ids, answer in zip(
            wanted, generate_all(overlapped, wanted, 32, custom_params={"guards": guards}), strict=True
        ):
            test_guards.check(name, ids, answer["output_ids"])


@pytest.fixture(scope="module")
def server(serve):
    return serve(*ARGS)


def test_a_seed_gives_the_same_output_alone_and_in_a_batch(server):
    ids, seeds = prompts()[3], range(6)
    alone = [generate(server, ids, 24, temperature=1.0, sampling_seed=seed) for seed in seeds]
    with ThreadPoolExecutor(16) as pool:
        noise = [pool.submit(generate, server, other, 24, temperature=1.0) for other in prompts()[40:50]]
        batch = list(pool.map(lambda seed: generate(server, ids, 24, temperature=1.0, sampling_seed=seed), seeds))
        for future in noise:
            future.result()
    outputs = [tuple(a["output_ids"]) for a in alone]
    assert outputs == [tuple(a["output_ids"]) for a in batch]
    assert len(set(outputs)) == len(outputs)


def test_outputs_over_all_seeds_follow_the_target_distribution(server):
    ids, samples = prompts()[1], 1000
    expected = exact_sequences(ids, 1.5, 3, 4)
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(
            lambda seed: generate(server, ids, 4, temperature=1.5, top_k=3, sampling_seed=seed),
            range(samples),
        )
        found = [tuple(a["output_ids"]) for a in answers]
    assert set(found) <= set(expected)
    statistic, bound = chi_square(found, expected)
    assert statistic < bound


@pytest.mark.parametrize("layers", [1, 2])
def test_checkpoints_with_fewer_mtp_layers(serve, tmp_path_factory, layers):
    shape = CheckpointShape(num_layers=5, num_mtp=layers, window=16, echo=1.5)
    directory = make_checkpoint(tmp_path_factory.mktemp(f"mtp{layers}"), shape, seed=5)
    server = serve(
        "--model-path", str(directory), "--device", "cpu", "--dtype", "float32", "--max-total-tokens", "16384",
        "--chunked-prefill-size", "32", "--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1",
        "--speculative-num-steps", str(layers), "--speculative-num-draft-tokens", str(layers + 1),
        "--enable-multi-layer-eagle",
    )  # fmt: skip
    target = load_reference(directory)
    for ids in [list(range(3, 3 + length)) for length in (1, 40, 90)]:
        tokens, accepted = target.speculative_greedy(ids, 24, layers)
        for _ in range(2):
            answer = generate(server, ids, 24)
            assert answer["output_ids"] == tokens[:24]
            assert histogram(answer)[: layers + 1] == [accepted.count(i) for i in range(layers + 1)]
    assert answer["meta_info"]["cached_tokens"] > 60


def draft_counts(server, name: str) -> list[float]:
    """One of our counters by draft position."""
    lines = re.findall(rf'^sglang:{name}_total{{.*position="(\d)".*}} (\S+)$', server.metrics(), re.M)
    return [float(value) for _, value in sorted(lines)]


def test_adaptive_depth_changes_no_token_and_drafts_as_well(serve):
    """Its first rounds measure every depth, so that layers were skipped and have caught up."""
    server = serve(*ARGS, "--speculative-adaptive", "--enable-metrics")
    wanted = prompts()[100:108]
    answers = [*generate_all(server, wanted, 64, at_once=1), *generate_all(server, wanted, 64)]
    assert [a["output_ids"] for a in answers] == 2 * [greedy(tuple(ids), 64) for ids in wanted]
    offered = draft_counts(server, "spec_offered_drafts")
    accepted = draft_counts(server, "spec_accepted_drafts")
    rounds = sum(a["meta_info"]["spec_verify_ct"] for a in answers)
    assert offered[2] > 0 and offered[0] < rounds
    histograms = [reference().speculative_greedy(ids, 64, 3)[1] for ids in wanted]
    offline = list(itertools.chain.from_iterable(histograms))
    four_deviations = 2 / offered[0] ** 0.5
    assert accepted[0] / offered[0] == pytest.approx(mean(a > 0 for a in offline), abs=four_deviations)
    check_plain_steps(server, wanted[0])


def check_plain_steps(server, ids: list[int]) -> None:
    """Where nothing is drafted a round may take several steps: the same tokens, sampled ones too, each its own step."""
    plain = dict(custom_params={"speculative_depth": 0})
    generate(server, ids, 32, **plain)  # until a step's time is known
    before = decode_batches(server)
    answer = generate(server, ids, 64, **plain)
    assert decode_batches(server) - before <= 63 / 4 + 3
    assert answer["output_ids"] == greedy(tuple(ids), 64)
    assert histogram(answer)[0] == answer["meta_info"]["spec_verify_ct"] == 63
    seeded = dict(plain, temperature=1.0, sampling_seed=7)
    one_by_one = generate(server, ids, 64, return_logprob=True, **seeded)
    assert generate(server, ids, 64, **seeded)["output_ids"] == one_by_one["output_ids"]


def decode_batches(server) -> float:
    """Decode batches the scheduler has run."""
    return float(re.search(r'^sglang:cuda_graph_passes_total{.*"decode_none".*} (\S+)$', server.metrics(), re.M)[1])


def test_aborts_and_disconnects_under_a_kv_shortage(serve):
    """30 % of the requests end at random in a pool too small for the rest; the others get their tokens."""
    # All at once: with decode rounds between their chunks some would be done before others begin.
    server = serve(*SMALL_ARGS, "--page-size", "1", "--prefill-decode-interval", "0")
    chance = random.Random(3)
    wanted = [ids + prompts()[i + 40] for i, ids in enumerate(prompts()[:40])]
    doomed = set(chance.sample(range(len(wanted)), 12))
    waits = [chance.uniform(0.05, 1.5) for _ in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        futures = [pool.submit(run, server, i, ids, waits[i], i in doomed) for i, ids in enumerate(wanted)]
        answers = [future.result() for future in futures]
    for i, ids in enumerate(wanted):
        if i not in doomed:
            assert answers[i]["output_ids"] == greedy(tuple(ids), 32), i
    assert any(a["meta_info"].get("num_retractions") for a in answers if a)
    assert server.post("/flush_cache", {}).ok  # refused while any request holds KV
    assert used_tokens(server) == 0


def run(server, number: int, ids: list[int], seconds: float, doomed: bool) -> dict | None:
    """The answer; of a doomed request none: every other one is aborted, the rest lose their client."""
    if not doomed:
        return generate(server, ids, 32)
    body = {
        "input_ids": ids, "rid": f"doomed-{number}", "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True},
    }  # fmt: skip
    with server.post("/generate", body, stream=True) as response:
        time.sleep(seconds)
        if number % 2:
            server.post("/abort_request", {"rid": f"doomed-{number}"})
            response.content  # until the server ends the stream
    return None


def used_tokens(server) -> float:
    """KV tokens in use once the idle server has reported them."""
    deadline = time.monotonic() + 20
    while True:
        used = float(re.search(r"^sglang:num_used_tokens{.*} (\S+)$", server.metrics(), re.M)[1])
        if used == 0 or time.monotonic() > deadline:
            return used
        time.sleep(0.2)
