"""Two replicas behind sglang-router, one killed under load, both restarted under load.

Every request either has the reference's answer to its last token or ends with an error, which a retry mends.
"""

import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import requests

from scripts.replicas.supervisor import Replicas
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, Server, free_port
from tests.support import warm
from tests.support.nano_model import greedy, prompts

pytestmark = pytest.mark.server
CLIENTS, TOKENS = 4, 48
PREFILL = re.compile(r"^\[.*\] Prefill batch", re.M)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    pytest.importorskip("sglang_router", reason="the extra [router] is not installed")
    args = (*NANO_ARGS, *MTP_ARGS, "--dtype", "float32")
    # Of the three ports from here on the others are likely free, too.
    group = Replicas(args, 2, tmp_path_factory.mktemp("replicas"), free_port(), warm.start_server, policy="round_robin")
    yield group
    group.close()


@dataclass
class Load:
    """Requests through the router until told to stop; prompts by their number."""

    url: str
    done: threading.Event = field(default_factory=threading.Event)
    answered: list[tuple[int, list[int]]] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def __enter__(self):
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._clients = [self._pool.submit(self._client, number) for number in range(CLIENTS)]
        return self

    def __exit__(self, *error):
        self.done.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()

    def _client(self, number: int) -> None:
        while not self.done.is_set():
            try:
                self.answered.append((number, ask(self.url, number)))
            except (requests.RequestException, RuntimeError) as error:
                self.failed.append((number, repr(error)))

    def wait_for_more(self, count: int) -> None:
        wanted = len(self.answered) + count
        while len(self.answered) < wanted:
            assert not all(client.done() for client in self._clients)
            time.sleep(0.05)


def prompt(number: int) -> tuple[int, ...]:
    return tuple(prompts()[number][:40])


def ask(url: str, number: int) -> list[int]:
    """Ids of a streamed answer. Raises for one that broke off, with or without an error in it."""
    body = {
        "input_ids": list(prompt(number)),
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
    }
    server = Server((), url, None, None)
    answer = list(server.stream("/generate", body, timeout=120))
    if not answer or answer[-1]["meta_info"]["finish_reason"] is None:
        raise RuntimeError("the stream ended without the answer's end")
    return answer[-1]["output_ids"]


def served(server: Server) -> int:
    """Prompts this process has computed."""
    return len(PREFILL.findall(server.log.read_text(errors="replace")))


def revived(group: Replicas, old: Server) -> Server:
    """The replica in the old one's place, once the router uses it."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        group.revive()
        for replica in group.replicas:
            new = replica.server
            if new.url == old.url and new is not old and new.url in group.router.healthy() and healthy(new):
                return new
        time.sleep(0.2)
    raise AssertionError(f"{old.url} did not come back")


def healthy(server: Server) -> bool:
    try:
        return requests.get(f"{server.url}/health", timeout=10).ok
    except requests.RequestException:
        return False


def check(load: Load) -> None:
    assert load.answered
    for number, ids in load.answered:
        assert ids == greedy(prompt(number), TOKENS)


def test_a_killed_replica_loses_nothing_silently_and_returns(replicas):
    url, victim = replicas.router.url, replicas.replicas[0].server
    with Load(url) as load:
        load.wait_for_more(8)
        os.killpg(victim.process.pid, signal.SIGKILL)
        load.wait_for_more(8)  # the other goes on
        new = revived(replicas, victim)
        before = served(new)
        load.wait_for_more(12)
    check(load)
    assert served(new) > before
    for number, _ in load.failed:
        assert ask(url, number) == greedy(prompt(number), TOKENS)
    # Only what ran in the dead replica, and what reached it before the router knew.
    assert len(load.failed) <= 3 * CLIENTS, load.failed


def test_a_rolling_restart_fails_nothing(replicas):
    old = [replica.server.process.pid for replica in replicas.replicas]
    with Load(replicas.router.url) as load:
        load.wait_for_more(4)
        replicas.roll()
        load.wait_for_more(4)
    check(load)
    assert load.failed == []
    assert not set(old) & {replica.server.process.pid for replica in replicas.replicas}
