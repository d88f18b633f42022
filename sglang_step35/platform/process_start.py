"""Start of SGLang's processes on the portable CPU platform: import once, then fork.

SGLang spawns its scheduler and detokenizer, so each imports again, for most of a start on few cores, what the first
process has just imported. On a host without an accelerator nothing forbids forking them instead. Only a process of
one thread is forked: no lock is held by a thread that the child lacks, and no thread pool (OpenMP's, ZeroMQ's) is lost.
"""

import atexit
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker, util

import torch

logger = logging.getLogger(__name__)


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection while modules are imported, a quarter of that time: what they create stays.

    Frozen afterwards, so that later collections pass over it and forked children do not copy it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def launch_by_fork(launch: Callable, engine: type, server_args, *args, **kwargs):
    """SGLang's `Engine._launch_scheduler_processes` and `_launch_detokenizer_subprocesses`, forking where that is safe.

    Kept: what is launched, with which arguments, and who supervises it. Replaced, for the time of the launch alone:
    multiprocessing's start method.
    """
    reason = why_spawn(server_args)
    if reason is not None:
        logger.info("SGLang spawns its processes, each importing everything again: %s", reason)
        return launch(engine, server_args, *args, **kwargs)
    with _forking():
        return launch(engine, server_args, *args, **kwargs)


def why_spawn(server_args) -> str | None:
    """Why this process must not fork SGLang's processes; None when it may."""
    from sglang.srt.platforms import current_platform

    from sglang_step35.platform.portable import PortablePlatform

    if not isinstance(current_platform, PortablePlatform):
        return "the platform is not the portable CPU platform"
    if torch.accelerator.is_available():
        return "this host has an accelerator, whose context does not survive a fork"
    if sys.platform != "linux":
        return "forking is safe on Linux only"
    if server_args.numa_node is not None or server_args.enable_memory_saver:
        return "NUMA binding and the memory saver act on the program that a spawned process executes"
    if _thread_count() > 1:
        return "this process has several threads"
    return None


def _thread_count() -> int:
    """Threads of this process, also those Python does not know; idle ones of OpenBLAS do not count."""
    if threading.active_count() > 1:
        return threading.active_count()
    tasks = "/proc/self/task"
    if len(os.listdir(tasks)) > 1:
        # NumPy's OpenBLAS starts its pool when imported, and ends it at a fork: in both processes, until needed again.
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    return len(os.listdir(tasks))


@contextmanager
def _forking() -> Iterator[None]:
    """`multiprocessing` forks inside; outside, and in the children, SGLang's own start method holds."""
    stock = multiprocessing.get_start_method()
    # Spawned siblings share their parent's tracker; forked ones would each start their own, which removes shared
    # memory that another still uses.
    resource_tracker.ensure_running()
    gc.freeze()
    child = _ForkedChild(stock)
    util.register_after_fork(child, _ForkedChild.begin)
    multiprocessing.set_start_method("fork", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(stock, force=True)


class _ForkedChild:
    """What a spawned child would have from its new interpreter. multiprocessing keeps only a weak reference to it."""

    def __init__(self, start_method: str):
        self.start_method = start_method

    def begin(self) -> None:
        multiprocessing.set_start_method(self.start_method, force=True)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        # The parent's exit handlers are not the child's; its own run only in an interpreter that ends by itself.
        atexit._clear()
        util.Finalize(None, atexit._run_exitfuncs, exitpriority=0)
