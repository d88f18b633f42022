"""Replicas kept alive at fixed addresses."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.replicas.router import Router
from sglang_step35.bench import servers
from sglang_step35.bench.servers import Server

DRAIN_SECONDS = 180  # for the answers that run at SIGTERM
SETTLE_SECONDS = 1  # a request that the router had already given to a replica arrives
SHORT_LIFE, LONGEST_PAUSE = 60, 60  # seconds: who ends sooner than that starts again later and later


@dataclass
class Replica:
    """One server, whichever process it is in."""

    port: int
    server: Server
    started: float
    failures: int = 0
    pause_until: float | None = None


class Replicas:
    """`count` servers with the same arguments on the ports after `port`, where the router listens.

    start: how a command becomes a process. flags: of the router.
    """

    def __init__(self, args: tuple[str, ...], count: int, folder: Path, port: int, start=servers.start, **flags):
        self.args, self.folder, self.port, self.start_process = args, folder, port, start
        self.flags = flags
        self.starts = 0
        self.replicas = []
        self.router = None
        try:
            self.replicas = [self._replica(port + 1 + index) for index in range(count)]
            for replica in self.replicas:
                servers.wait_until_healthy(replica.server)
            self.route(**flags)
            self.router.wait_for([replica.server.url for replica in self.replicas])
        except BaseException:
            self.close()
            raise

    def route(self, **flags) -> None:
        """A router in front of the replicas, instead of the one there is."""
        self._end_router()
        urls = [replica.server.url for replica in self.replicas]
        self.flags = flags
        self.router = Router(self.port, urls, self.folder / "router.log", **flags)

    def revive(self, say: Callable[[str], None] = print) -> None:
        """Start what ended again; the router uses a replica once its health check passes."""
        if self.router.process.poll() is not None:
            say("the router ended")
            self.route(**self.flags)
        for replica in self.replicas:
            now = time.monotonic()
            if replica.server.process.poll() is None:
                continue
            if replica.pause_until is None:
                servers.stop(replica.server)  # its other processes
                replica.failures = replica.failures + 1 if now - replica.started < SHORT_LIFE else 0
                replica.pause_until = now + min(LONGEST_PAUSE, 2**replica.failures - 1)
                say(f"{replica.server.url} ended, its log: {replica.server.log}")
            if now >= replica.pause_until:
                self._restart(replica)

    def roll(self, say: Callable[[str], None] = print) -> None:
        """Restart one after the other without failing a request: out of the router, drained, anew, in again."""
        for replica in self.replicas:
            url = replica.server.url
            self.router.remove(url)
            time.sleep(SETTLE_SECONDS)
            drain([replica.server])
            self._restart(replica)
            servers.wait_until_healthy(replica.server)
            self.router.add(url)
            say(f"{url} restarted")

    def close(self) -> None:
        """End the router when its answers are complete, then the replicas."""
        self._end_router()
        drain([replica.server for replica in self.replicas])

    def _replica(self, port: int) -> Replica:
        return Replica(port, self._launch(port), time.monotonic())

    def _restart(self, replica: Replica) -> None:
        replica.server, replica.started, replica.pause_until = self._launch(replica.port), time.monotonic(), None

    def _launch(self, port: int) -> Server:
        self.starts += 1
        log = self.folder / f"replica-{port}-{self.starts}.log"
        return servers.launch(self.args, log, {}, self.start_process, port)

    def _end_router(self) -> None:
        if self.router is not None:
            self.router.process.send_signal(signal.SIGTERM)
            wait_or_kill(self.router.process)
            self.router = None


def drain(group: list[Server]) -> None:
    """SGLang ends at SIGTERM when all its answers are complete; what then is left of a server is killed."""
    for server in group:
        server.process.send_signal(signal.SIGTERM)
    for server in group:
        wait_or_kill(server.process)
        servers.stop(server)


def wait_or_kill(process: servers.Process) -> None:
    try:
        process.wait(DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
