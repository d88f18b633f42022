"""Servers of several ranks on this machine's CPU: tensor, expert, pipeline and data parallelism, two nodes.

What needs no server is in tests/model/test_ranks.py. No environment variable divides the cores.
"""

import itertools
import json
import re

import pytest
import torch

from sglang_step35.assets import NANO as NANO_FOLDER
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, free_port, launch, stop, wait_until_healthy
from tests.support import warm
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.gguf_files import write_gguf
from tests.support.nano_model import generate_all, greedy, histogram, prompts, reference
from tests.support.reference import Reference, load_reference

pytestmark = pytest.mark.server
NANO = (*NANO_ARGS, "--dtype", "float32", "--chunked-prefill-size", "64")
ALONE = (*NANO, *MTP_ARGS)
# Each of two key/value heads is copied to two of the four ranks; the shared expert of 34 stays whole.
FOUR = CheckpointShape(heads=8, sliding_heads=4, window=48, shared_size=34, embedding_copies=True, echo=1.5)


def assert_the_references(server, reference, requests, count=32):
    """Tokens and accepted drafts of an offline loop that recomputes everything, and again from the prefix cache."""
    for _ in range(2):
        answers = generate_all(server, requests, count, at_once=4)
        for ids, answer in zip(requests, answers, strict=True):
            tokens, accepted = reference.speculative_greedy(ids, count, 3)
            assert answer["output_ids"] == tokens[:count] == reference.greedy(ids, count)
            assert histogram(answer) == [accepted.count(i) for i in range(4)]
    assert sum(answer["meta_info"]["cached_tokens"] for answer in answers) > 100


@pytest.fixture(scope="module")
def two_ranks(serve):
    return serve(*ALONE, "--tp-size", "2")


def test_two_tensor_parallel_ranks(two_ranks):
    """Prompts shorter and longer than the window of 64 and a chunk of 64."""
    assert_the_references(two_ranks, reference(), [*prompts()[:4], [300], [77] * 150])
    assert re.search(r"TP1\] rank 1 of the 2 on this host: cores \d", two_ranks.log.read_text())


def test_sampled_and_constrained_batches_are_those_of_one_rank(serve):
    """Seeded, mixed with greedy ones, in one batch; the JSON schema's texts token by token."""
    kinds = {"kind": {"enum": ["alpha", "beta"]}, "done": {"type": "boolean"}}
    schema = {"type": "object", "properties": kinds, "required": list(kinds), "additionalProperties": False}
    options = (
        {"temperature": 0.9, "top_p": 0.9, "sampling_seed": 11},
        {"temperature": 1.2, "top_k": 20, "sampling_seed": 12, "frequency_penalty": 0.3},
        {"json_schema": json.dumps(schema), "ignore_eos": False},
    )
    found = []
    for ranks in ("1", "2"):
        server = serve(*ALONE) if ranks == "1" else serve(*ALONE, "--tp-size", ranks)
        answers = itertools.chain.from_iterable(generate_all(server, prompts()[8:12], 40, **rule) for rule in options)
        found.append([(answer["output_ids"], histogram(answer)) for answer in answers])
    assert found[0] == found[1]


def test_four_ranks_with_adaptive_depth(serve, tmp_path_factory):
    """Key/value heads copied, experts in two halves, each cut in two; rounds that skip MTP layers."""
    directory = make_checkpoint(tmp_path_factory.mktemp("four"), FOUR, seed=5)
    server = serve(
        "--model-path", str(directory), "--device", "cpu", "--dtype", "float32", "--max-total-tokens", "16384",
        *MTP_ARGS, "--speculative-adaptive", "--tp-size", "4", "--ep-size", "2",
    )  # fmt: skip
    target = load_reference(directory)
    requests = [list(range(3, 3 + length)) for length in (1, 49, 90)]
    answers = generate_all(server, requests, 24, at_once=3)
    assert [answer["output_ids"] for answer in answers] == [target.greedy(ids, 24) for ids in requests]
    assert "MTP layers use their own layer 0 head, layer 1 head, layer 2 head\n" in server.log.read_text()


def test_two_pipeline_ranks(serve):
    server = serve(*NANO, "--pp-size", "2", "--max-running-requests", "8")
    wanted = [*prompts()[:3], [77] * 90]
    answers = generate_all(server, wanted, 24, at_once=4)
    assert [answer["output_ids"] for answer in answers] == [greedy(tuple(ids), 24) for ids in wanted]


def test_two_replicas(serve):
    server = serve(*ALONE, "--dp-size", "2")
    wanted = prompts()[:6]
    answers = generate_all(server, wanted, 24, at_once=6)
    assert [answer["output_ids"] for answer in answers] == [greedy(tuple(ids), 24) for ids in wanted]
    assert {answer["meta_info"]["dp_rank"] for answer in answers} == {0, 1}


def test_two_nodes_with_a_packed_file(tmp_path):
    """Two servers' worth of processes that meet at an address; the second node has no API of its own.

    Attention and dense layers divided between the blocks of 32, experts of 32 columns by number.
    """
    file = tmp_path / "nano.gguf"
    weights = {name: torch.from_numpy(weight.copy()) for name, weight in write_gguf(NANO_FOLDER, file).items()}
    address = f"127.0.0.1:{free_port()}"
    nodes = ("--tp-size", "2", "--ep-size", "2", "--nnodes", "2", "--dist-init-addr", address)
    started = []
    try:
        for rank in ("1", "0"):
            args = (*ALONE, "--model-path", str(file), *nodes, "--node-rank", rank)
            started.append(launch(args, tmp_path / f"{rank}.log", {}, warm.start_server))
        wait_until_healthy(started[1])
        target = Reference(json.loads((NANO_FOLDER / "config.json").read_text()), weights)
        assert_the_references(started[1], target, prompts()[:4])
    finally:
        for server in reversed(started):
            stop(server)
