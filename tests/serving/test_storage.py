"""Conversations outlive the server: KV read from files is that of every layer, and never a damaged file's.

Drafts depend on the MTP layers' KV and tokens on the backbone's: ids are the reference's and accepted drafts those of
the offline loop, which recomputes everything.
"""

import json
import os
import time

import pytest

from sglang_step35.bench.servers import stop
from tests.support.cache_fuzz import HOST_ARGS, Case, Outcome, ask
from tests.support.nano_model import prompts, reference

pytestmark = pytest.mark.server
TURN, COUNT, DRAFTS = 40, 24, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kv")


@pytest.fixture(scope="module")
def args(folder):
    extra = json.dumps({"file_storage_path": str(folder), "prefetch_threshold": 32})
    return (
        *HOST_ARGS, "--page-size", "16", "--hicache-storage-backend", "file",
        "--hicache-storage-prefetch-policy", "wait_complete", "--hicache-storage-backend-extra-config", extra,
    )  # fmt: skip


def offline(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids and rounds that accepted 0 .. 3 drafts."""
    tokens, accepted = reference().speculative_greedy(list(case.ids), case.count, DRAFTS)
    return tuple(tokens[: case.count]), tuple(accepted.count(i) for i in range(DRAFTS + 1))


def wait_until_written(folder) -> None:
    seen = -1
    while seen != (seen := len(os.listdir(folder))) or not seen:
        time.sleep(0.5)


def next_turn(case: Case, outcome: Outcome) -> Case:
    return Case((*case.ids, *outcome.ids, *prompts()[9][:TURN]), COUNT)


def test_next_turns_after_a_restart_are_read_and_not_computed(serve, args, folder):
    kept, damaged = (Case(tuple(prompts()[i] + prompts()[i + 1]), COUNT) for i in (3, 5))
    server = serve(*args)
    (first,) = ask(server, [kept])
    wait_until_written(folder)
    whole = set(os.listdir(folder))
    (other,) = ask(server, [damaged])
    wait_until_written(folder)
    stop(server)
    for name in set(os.listdir(folder)) - whole:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    server = serve(*args)
    turns = [next_turn(kept, first), next_turn(damaged, other)]
    found = ask(server, turns)
    assert found[0].loaded >= len(kept.ids)  # and whole pages of the answer
    assert found[1].loaded == 0
    assert server.log.read_text().count("is damaged") == 1
    assert [(one.ids, one.accepted) for one in found] == list(map(offline, turns))
