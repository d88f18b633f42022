"""Time from the command to a served completion, SGLang's processes spawned and forked, in turns in one run.

    python -m scripts.benchmarks.startup [--rounds 3]

Both serve the packaged nano checkpoint with MTP on the CPU. One server at a time; each round starts one of each kind,
so that a machine that slows down slows both. CPU seconds are those of the whole process tree, and tell more than the
clock on a busy machine. Memory is the sum of what each process holds for itself and its share of common pages.
Ends in one JSON line of medians.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import requests

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, START_SECONDS, Server, ServerFailed, free_port, stop

COMMANDS = {
    "spawned": (sys.executable, "-m", "scripts.benchmarks.startup_spawned"),
    "forked": (str(Path(sys.executable).with_name("sglang")),),
}
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Start:
    """One start: seconds from the command to the first success of /health and to the first completion."""

    healthy_s: float
    completion_s: float
    cpu_s: float
    memory_mib: float


def launch(way: str, log: Path) -> Server:
    port = free_port()
    args = (*NANO_ARGS, *MTP_ARGS)
    command = [*COMMANDS[way], "serve", *args, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Server(args, f"http://127.0.0.1:{port}", log, process)


def wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{server.url}/health", timeout=30).ok:
                return
        if server.process.poll() is not None:
            break
        time.sleep(POLL_SECONDS)
    raise ServerFailed(f"not healthy after {START_SECONDS} s or ended; its log ends:\n{server.tail()}")


def measure(way: str, folder: Path) -> Start:
    """Start one server, ask it for one completion, stop it."""
    begin = time.monotonic()
    server = launch(way, folder / f"{way}.log")
    try:
        wait(server)
        healthy = time.monotonic() - begin
        server.generate("def add(a, b):", max_new_tokens=1)
        completion = time.monotonic() - begin
        main = psutil.Process(server.process.pid)
        processes = [main, *main.children(recursive=True)]
        cpu = sum(sum(process.cpu_times()[:2]) for process in processes)
        memory = sum(process.memory_full_info().pss for process in processes) / 2**20
    finally:
        stop(server)
    return Start(healthy, completion, cpu, memory)


def median(starts: list[Start]) -> dict[str, float]:
    columns = [asdict(start) for start in starts]
    return {name: round(statistics.median(column[name] for column in columns), 2) for name in columns[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    starts: dict[str, list[Start]] = {way: [] for way in COMMANDS}
    print(f"{'':10}{'healthy s':>12}{'completion s':>14}{'CPU s':>8}{'MiB':>8}   load", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for way, done in starts.items():
                load = os.getloadavg()[0]
                start = measure(way, Path(folder))
                done.append(start)
                row = f"{start.healthy_s:12.1f}{start.completion_s:14.1f}{start.cpu_s:8.1f}{start.memory_mib:8.0f}"
                print(f"{way:10}{row}   {load:.1f}", flush=True)
    medians = {way: median(done) for way, done in starts.items()}
    times_faster = {name: round(medians["spawned"][name] / medians["forked"][name], 2) for name in medians["forked"]}
    print(json.dumps({"rounds": rounds, "cores": os.cpu_count(), "medians": medians, "times_less": times_faster}))


if __name__ == "__main__":
    main()
