"""Ranks and servers forked from one process that has imported SGLang: each import takes longer than most tests.

multiprocessing's fork server is a new process of one thread, so nothing of the test process gets into its children.
It passes over what it cannot import, as where the working directory is another: then every child imports by itself.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.multiprocessing

from sglang_step35.bench import servers

PRELOADED = "tests.support.preloaded"
_fork_server = multiprocessing.get_context("forkserver")
_fork_server.set_forkserver_preload([PRELOADED])


def call(function: Callable):
    """What the function returns in a process that has imported SGLang, loaded its plug-ins and done nothing else."""
    with ProcessPoolExecutor(1, _fork_server) as pool:
        return pool.submit(_call, function).result()


def _call(function: Callable):
    importlib.import_module(PRELOADED)
    return function()


def run_ranks(main: Callable, *args) -> None:
    """`main(rank, *args)` in two processes of one thread each; raises what one of them raises."""
    torch.multiprocessing.start_processes(_rank, (main, args), nprocs=2, start_method="forkserver")


def _rank(rank: int, main: Callable, args: tuple) -> None:
    importlib.import_module(PRELOADED)
    torch.set_num_threads(1)
    main(rank, *args)


def start_server(
    command: list[str], env: dict[str, str], log: Path, before: Callable[[], None] | None = None
) -> servers.Process:
    """`servers.start`, forked where nothing forbids it: a GPU's context does, and what SGLang reads when imported.

    `before` runs in the forked process before SGLang's command; without a fork it cannot.
    """
    own = {name for name, value in env.items() if os.environ.get(name) != value} - {"OMP_NUM_THREADS"}
    if own or torch.accelerator.is_available():
        assert before is None
        return servers.start(command, env, log)
    return ForkedServer(command, env, log, before)


class ForkedServer:
    """A command `sglang serve ...` in a forked process, with what `Server` needs of subprocess.Popen."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path, before: Callable[[], None] | None = None):
        self._process = _fork_server.Process(target=_serve, args=(command, env, log, before))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("sglang serve", timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _serve(command: list[str], env: dict[str, str], log: Path, before: Callable[[], None] | None) -> None:
    """What the script `sglang` does, in a session of its own."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    importlib.import_module(PRELOADED)
    os.environ.update(env)  # what the plug-ins set while they were loaded stays
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # OpenMP read the fork server's environment
    sys.argv = command
    if before is not None:
        before()
    from sglang.cli.main import main

    sys.exit(main())
