"""What may befall a server: a jumping clock, too little memory, a full disk; and answers that were under way."""

import mmap
import resource
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from sglang_step35.bench.servers import Server

PATIENCE = 120  # seconds for an answer


class Clock:
    """The wall clock of a server's processes, `jump` seconds from the true one."""

    def __init__(self, file: Path):
        self.file = file
        file.write_bytes(struct.pack("d", 0))

    def jump(self, seconds: float) -> None:
        with self.file.open("r+b") as shared:
            shared.write(struct.pack("d", seconds))

    def install(self) -> None:
        """In a server's first process, which forks the others: `time.time` and `time.time_ns`, whoever holds them."""
        with self.file.open("rb") as shared:
            ahead = mmap.mmap(shared.fileno(), 8, prot=mmap.PROT_READ)
        seconds, nanoseconds = time.time, time.time_ns
        moved = {
            seconds: lambda: seconds() + struct.unpack("d", ahead)[0],
            nanoseconds: lambda: nanoseconds() + int(1e9 * struct.unpack("d", ahead)[0]),
        }
        for module in list(sys.modules.values()):
            for name, value in list(vars(module).items()):
                for function, other in moved.items():
                    if value is function:
                        setattr(module, name, other)


def limit_memory() -> None:
    """In a server's first process: 1 GiB more of address space than it has, for it and each process it forks."""
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))


@contextmanager
def full_disk(processes: list[psutil.Process]):
    """No file of these processes grows beyond 4 KiB, as on a full disk: logs, KV on disk."""
    before = [process.rlimit(psutil.RLIMIT_FSIZE) for process in processes]
    for process, (_, hard) in zip(processes, before):
        process.rlimit(psutil.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        for process, limits in zip(processes, before):
            process.rlimit(psutil.RLIMIT_FSIZE, limits)


def processes_of(server: Server) -> dict[str, psutil.Process]:
    """By name: the server's first process (`main`), `scheduler`, `detokenizer`; forked ones may lack their titles."""
    main = psutil.Process(server.process.pid)
    others = [child for child in main.children() if "resource_tracker" not in " ".join(child.cmdline())]
    scheduler, detokenizer = sorted(others, key=psutil.Process.create_time)  # in this order SGLang starts them
    return {"main": main, "scheduler": scheduler, "detokenizer": detokenizer}


class Streams:
    """Greedy streams of `count` tokens, one a prompt, begun before a fault and looked at after it."""

    def __init__(self, server: Server, requests: list[list[int]], count: int, begun: int | None = None):
        """Returns when `begun` of them, all by default, have sent tokens."""
        self._first = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(len(requests))
        self._answers = [self._pool.submit(self._read, server, ids, count) for ids in requests]
        for _ in range(len(requests) if begun is None else begun):
            assert self._first.acquire(timeout=PATIENCE), server.tail()

    def _read(self, server: Server, ids: list[int], count: int) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
        answer: dict = {}
        for event in server.stream("/generate", body, PATIENCE):
            if not answer:
                self._first.release()
            answer = event
        return answer["output_ids"]

    def outputs(self) -> list[list[int]]:
        """Token ids of every answer; raises what one of them met."""
        return [answer.result(PATIENCE) for answer in self._answers]

    def errors(self, seconds: float) -> list[BaseException | None]:
        """What each met, within this time."""
        deadline = time.monotonic() + seconds
        return [answer.exception(max(0.0, deadline - time.monotonic())) for answer in self._answers]
