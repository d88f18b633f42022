"""What goes wrong around a server: what its users see, and that nothing acknowledged is lost.

One server lives through the faults that pass and ends in a drain; each of the others ends its own. docs/operations.md
has the table.
"""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest
import requests
import torch

from sglang_step35.assets import NANO
from sglang_step35.bench import servers
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, ServerPool
from tests.support import warm
from tests.support.faults import Clock, Streams, full_disk, limit_memory, processes_of
from tests.support.gguf_files import write_gguf
from tests.support.nano_model import generate, prompts
from tests.support.reference import Reference

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="the clock and the limits are set in a forked process"),
]
DAY = 86400.0
AT_ONCE = 8  # requests that run; others wait
NOTICED = 20  # seconds until a lost process has ended everything
MODEL = {"model": "step3p5-nano"}
USER = {"messages": [{"role": "user", "content": "Hi"}]}
BODIES = {
    "/generate": {"text": "Hi", "sampling_params": {"max_new_tokens": 1}},
    "/v1/chat/completions": {**MODEL, **USER, "max_tokens": 1, "stream": True},
    "/v1/messages": {**MODEL, **USER, "max_tokens": 1},
    "/api/chat": {**MODEL, **USER},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def clock(folder):
    return Clock(folder / "clock")


@pytest.fixture(scope="module")
def reference(folder):
    """float32, of the weights in a GGUF file, which the server maps into its memory."""
    weights = write_gguf(NANO, folder / "nano.gguf")
    fields = json.loads((NANO / "config.json").read_text())
    return Reference(fields, {name: torch.from_numpy(weight.copy()) for name, weight in weights.items()})


@pytest.fixture(scope="module")
def server(folder, clock, reference):
    """Its prefix cache goes on to host memory and to files."""
    pool = ServerPool(folder, 1, partial(warm.start_server, before=clock.install))
    extra = json.dumps({"file_storage_path": str(folder / "kv")})
    try:
        yield pool.get(
            *NANO_ARGS, "--model-path", str(folder / "nano.gguf"), "--dtype", "float32", "--page-size", "16",
            "--max-running-requests", str(AT_ONCE), "--max-total-tokens", "4096", "--enable-hierarchical-cache",
            "--hicache-ratio", "2", "--swa-full-tokens-ratio", "0.5", "--hicache-write-policy", "write_through",
            *MTP_ARGS, "--hicache-storage-backend", "file", "--hicache-storage-backend-extra-config", extra,
        )  # fmt: skip
    finally:
        pool.stop_all()


def streams(server, first: int, count: int, tokens: int, **options) -> tuple[Streams, list[list[int]]]:
    asked = prompts()[first : first + count]
    return Streams(server, asked, tokens, **options), asked


def test_processes_that_stand_still_for_ten_seconds_go_on(server, reference):
    under_way, asked = streams(server, 0, 3, 150)
    processes = processes_of(server)
    processes["scheduler"].suspend()
    assert requests.get(f"{server.url}/model_info", timeout=10).ok  # the HTTP side alone
    for process in processes.values():
        process.suspend()
    time.sleep(10)
    for process in processes.values():
        process.resume()
    assert under_way.outputs() == [reference.greedy(ids, 150) for ids in asked]
    assert requests.get(f"{server.url}/health", timeout=30).ok


def test_jumps_of_the_clock_disturb_nothing(server, clock, reference):
    under_way, asked = streams(server, 3, 2, 100)
    for ahead in (-DAY, DAY, 0.0):
        clock.jump(ahead)
        assert requests.get(f"{server.url}/health", timeout=30).ok
    assert under_way.outputs() == [reference.greedy(ids, 100) for ids in asked]
    body = {**MODEL, "prompt": "def f", "raw": True, "stream": False, "options": {"num_predict": 200, "temperature": 2}}
    with ThreadPoolExecutor(1) as pool:
        start = time.perf_counter()
        answer = pool.submit(server.post, "/api/generate", body)
        time.sleep(0.05)
        clock.jump(-DAY)
        assert 0 < answer.result().json()["total_duration"] < 1e9 * (time.perf_counter() - start)
    clock.jump(0.0)


def test_a_checkpoint_may_be_removed_while_it_is_served(server, folder, reference):
    (folder / "nano.gguf").unlink()
    ids = prompts()[6]
    assert generate(server, ids, 32)["output_ids"] == reference.greedy(ids, 32)
    assert server.post("/v1/chat/completions", {**MODEL, **USER, "max_tokens": 4}).ok
    assert requests.get(f"{server.url}/v1/models", timeout=30).ok


def test_a_full_disk_costs_log_lines_and_kept_prefixes_only(server, folder, reference):
    generate(server, prompts()[7], 1)
    wait_for_more(folder / "kv", 0)
    with full_disk(list(processes_of(server).values())):
        time.sleep(0.5)  # a file that is whole is renamed still
        kept, logged = whole_files(folder / "kv"), server.log.stat().st_size
        under_way, asked = streams(server, 8, 4, 64)
        assert under_way.outputs() == [reference.greedy(ids, 64) for ids in asked]
        assert server.log.stat().st_size == logged
        assert whole_files(folder / "kv") == kept
    ids = prompts()[12]
    assert generate(server, ids, 32)["output_ids"] == reference.greedy(ids, 32)
    wait_for_more(folder / "kv", len(kept))
    assert server.log.stat().st_size > logged


def whole_files(folder) -> set[str]:
    return {name for name in os.listdir(folder) if name.endswith(".bin")}


def wait_for_more(folder, count: int) -> None:
    wait_until(lambda: len(whole_files(folder)) > count, "no KV was written")


def wait_until(so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 30
    while not so():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def test_sigterm_answers_what_was_accepted_and_refuses_what_comes_after(server, reference):
    """Running requests and waiting ones; the last test of this server."""
    under_way, asked = streams(server, 14, AT_ONCE + 2, 200, begun=AT_ONCE)
    wait_until(lambda: waiting(server) >= 2, "the last two did not come")
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    for path, body in BODIES.items():
        refused = server.post(path, body)
        assert refused.status_code == 503 and "shutting down" in refused.text, path
    assert requests.get(f"{server.url}/health", timeout=30).status_code == 503
    assert under_way.outputs() == [reference.greedy(ids, 200) for ids in asked]
    assert server.process.wait(60) == 0


def waiting(server) -> int:
    """Requests in the scheduler's queue."""
    return requests.get(f"{server.url}/v1/loads", timeout=30).json()["loads"][0]["num_waiting_reqs"]


@pytest.mark.parametrize("lost", ["scheduler", "detokenizer"])
def test_a_lost_process_ends_the_server_and_every_request(tmp_path, lost):
    pool = ServerPool(tmp_path, 1, warm.start_server)
    try:
        server = pool.get(*NANO_ARGS, *MTP_ARGS)
        processes = processes_of(server)
        under_way, _ = streams(server, 0, 3, 2000)
        processes[lost].kill()
        assert all(isinstance(error, requests.RequestException) for error in under_way.errors(NOTICED))
        assert server.process.wait(NOTICED) != 0
        gone, left = psutil.wait_procs(processes.values(), NOTICED)
        assert left == []
        assert f"Subprocess {lost}" in server.tail() and "crashed with exit code -9" in server.tail()
        with pytest.raises(requests.ConnectionError):
            server.generate("Hi")
    finally:
        pool.stop_all()


def test_a_taken_port_ends_the_start_before_the_model_is_loaded(tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(servers, "free_port", lambda: other.getsockname()[1])
        server = servers.launch(NANO_ARGS, tmp_path / "log", {}, warm.start_server)
        try:
            assert server.process.wait(60) == 1
        finally:
            servers.stop(server)
    assert "cannot listen on 127.0.0.1" in server.tail()
    assert "Load weight" not in server.log.read_text()


def test_too_little_memory_at_the_start_names_the_flag(tmp_path):
    args = (*NANO_ARGS, "--max-total-tokens", "2000000")
    server = servers.launch(args, tmp_path / "log", {}, partial(warm.start_server, before=limit_memory))
    try:
        assert server.process.wait(120) != 0
    finally:
        servers.stop(server)
    assert "set --max-total-tokens, --max-running-requests" in server.tail()
