"""Real `sglang serve` processes on this machine, for tests and benchmarks: started on demand, shared, stopped for
certain."""

import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import requests
import torch

from sglang_step35.assets import NANO

START_SECONDS = 300
STOP_SECONDS = 15
FLUSH_SECONDS = 10
TRACKER_SECONDS = 2  # multiprocessing's tracker removes shared memory after the others are gone
TAIL_LINES = 40
LINE_WIDTH = 300  # SGLang logs all of its arguments in one line of 20,000 characters
PORTS = range(12_000, 30_000)  # SGLang adds up to 1,000 for its own
ALIVE = 2  # servers kept at the same time; the least recently used one makes room

# Argument lists to build on: the packaged checkpoint on the CPU, and the seed's speculative flags.
NANO_ARGS = (
    "--model-path", str(NANO), "--served-model-name", "step3p5-nano", "--device", "cpu",
    "--tool-call-parser", "step3p5", "--reasoning-parser", "step3p5",
    "--max-total-tokens", "16384",  # else the KV pools take most of the host's memory
)  # fmt: skip
MTP_ARGS = (
    "--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1",
    "--speculative-num-draft-tokens", "4", "--enable-multi-layer-eagle",
)  # fmt: skip


Start = Callable[[list[str], dict[str, str], Path], "Process"]  # command, environment, log


class ServerFailed(RuntimeError):
    pass


class Process(Protocol):
    """What is used of subprocess.Popen; the leader of a process group of its own."""

    pid: int

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...


@dataclass
class Server:
    args: tuple[str, ...]
    url: str
    log: Path
    process: Process

    def post(self, path: str, body: dict, **options) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=options.pop("timeout", 120), **options)

    def stream(self, path: str, body: dict, timeout: float) -> Iterator[dict]:
        """The events of a streamed answer. Raises RuntimeError for an error among them, refused after the start."""
        with self.post(path, body, stream=True, timeout=timeout) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    answer = json.loads(line[6:])
                    if "error" in answer:
                        raise RuntimeError(f"{self.url}: {answer['error']}")
                    yield answer

    def generate(self, text: str, **sampling) -> dict:
        """Answer of SGLang's native endpoint: `text` and `meta_info`; greedy unless told otherwise."""
        sampling = {"temperature": 0, "max_new_tokens": 32} | sampling
        response = self.post("/generate", {"text": text, "sampling_params": sampling})
        response.raise_for_status()
        return response.json()

    def flush_cache(self) -> None:
        """Empty the prefix cache, once the last answered request has left the scheduler."""
        self.post(f"/flush_cache?timeout={FLUSH_SECONDS}", {}).raise_for_status()

    def metrics(self) -> str:
        """What Prometheus would scrape; the server needs --enable-metrics."""
        return requests.get(f"{self.url}/metrics", timeout=30).text

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join(line[:LINE_WIDTH] for line in lines)


def free_port() -> int:
    """None of those that systems give to connections, which could have it before its server does."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start(command: list[str], env: dict[str, str] | None, log: Path) -> Process:
    """Run the command; its output goes to the log. env None: this process's."""
    with log.open("wb") as out:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def launch(
    args: tuple[str, ...], log: Path, extra_env: dict[str, str], start: Start = start, port: int | None = None
) -> Server:
    """A server on this port of 127.0.0.1, any free one where none is given; it is not healthy yet."""
    port = port or free_port()
    sglang = Path(sys.executable).with_name("sglang")
    command = [str(sglang), "serve", *args, "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **extra_env}
    device = dict(itertools.pairwise(args)).get("--device")  # given twice, the last one counts
    if device == "cpu" and torch.accelerator.is_available():
        env["SGLANG_PLATFORM"] = "step35"  # elsewhere the CPU platform activates by itself
    return Server(args, f"http://127.0.0.1:{port}", log, start(command, env, log))


def wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerFailed(f"server exited with {server.process.returncode}; its log ends:\n{server.tail()}")
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{server.url}/health", timeout=10).ok:
                return
        time.sleep(0.25)
    raise ServerFailed(f"server not healthy after {START_SECONDS} s; its log ends:\n{server.tail()}")


def stop(server: Server) -> None:
    """Ask the HTTP server to stop, then end what is left of its process group (scheduler, detokenizer)."""
    group = server.process.pid
    server.process.send_signal(signal.SIGINT)  # SIGTERM would wait 5 s for requests to drain
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        deadline = time.monotonic() + TRACKER_SECONDS
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
    server.process.wait()


class ServerPool:
    """Servers keyed by their arguments. A set of arguments that failed once fails at once afterwards."""

    def __init__(self, folder: Path, alive: int = ALIVE, start: Start = start):
        self.folder = folder
        self.alive = alive
        self.start_process = start
        self.running: OrderedDict[tuple[str, ...], Server] = OrderedDict()
        self.failed: dict[tuple[str, ...], str] = {}
        self.started = 0

    def get(self, *args: str, **env: str) -> Server:
        """The server with these arguments and, beyond ours, SGLang environment variables."""
        key = (*args, *(f"{name}={value}" for name, value in sorted(env.items())))
        if key in self.failed:
            raise ServerFailed(self.failed[key])
        server = self.running.pop(key, None)
        if server is not None and server.process.poll() is not None:
            stop(server)  # killed by an earlier test: its children may live on
            server = None
        if server is None:
            server = self._start(key, args, env)
        self.running[key] = server
        return server

    def _start(self, key: tuple, args: tuple[str, ...], env: dict[str, str]) -> Server:
        while len(self.running) >= self.alive:
            stop(self.running.popitem(last=False)[1])
        self.started += 1
        server = launch(args, self.folder / f"server-{self.started}.log", env, self.start_process)
        try:
            wait_until_healthy(server)
        except BaseException as error:
            stop(server)
            if isinstance(error, ServerFailed):
                self.failed[key] = str(error)
            raise
        return server

    def stop_all(self) -> None:
        while self.running:
            stop(self.running.popitem()[1])
