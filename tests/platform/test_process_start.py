"""Forked start: only on our CPU platform with one thread, and the server it gives stops like SGLang's own."""

import atexit
import contextlib
import gc
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from sglang.srt import platforms

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, STOP_SECONDS, ServerPool
from sglang_step35.platform import process_start
from sglang_step35.platform.portable import PortablePlatform
from sglang_step35.platform.process_start import collection_paused, launch_by_fork, why_spawn
from tests.support.thread_counts import count_threads

ARGUMENTS = SimpleNamespace(numa_node=None, enable_memory_saver=False)
PATIENCE = 30  # seconds


@pytest.fixture
def portable(monkeypatch):
    """A process of one thread on our platform, without an accelerator, where SGLang chose to spawn."""
    monkeypatch.setattr(platforms, "_current_platform", PortablePlatform(), raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(process_start, "_thread_count", lambda: 1)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield monkeypatch
    multiprocessing.set_start_method(before, force=True)


def start_method(engine, server_args):
    return multiprocessing.get_start_method()


def test_forks_on_our_platform_and_leaves_stock_start_method(portable):
    assert why_spawn(ARGUMENTS) is None
    assert launch_by_fork(start_method, object, server_args=ARGUMENTS) == "fork"
    assert multiprocessing.get_start_method() == "spawn"


def test_a_failed_launch_leaves_stock_start_method(portable):
    def fail(engine, server_args):
        raise OSError("no more processes")

    with pytest.raises(OSError, match="no more processes"):
        launch_by_fork(fail, object, ARGUMENTS)
    assert multiprocessing.get_start_method() == "spawn"


def test_never_on_cuda(portable):
    portable.setattr(platforms, "_current_platform", platforms.SRTPlatform())
    assert "platform" in why_spawn(ARGUMENTS)
    assert launch_by_fork(start_method, object, ARGUMENTS) == "spawn"


def test_never_beside_a_gpu_even_on_our_platform(portable):
    portable.setattr(torch.accelerator, "is_available", lambda: True)
    assert "accelerator" in why_spawn(ARGUMENTS)
    assert launch_by_fork(start_method, object, ARGUMENTS) == "spawn"


def test_never_another_platform_than_linux(portable):
    portable.setattr(process_start.sys, "platform", "darwin")
    assert "Linux" in why_spawn(ARGUMENTS)


@pytest.mark.parametrize("changed", [{"numa_node": [0]}, {"enable_memory_saver": True}])
def test_never_where_sglang_wraps_the_spawned_program(portable, changed):
    assert "NUMA" in why_spawn(SimpleNamespace(**(vars(ARGUMENTS) | changed)))


def test_never_with_threads(portable):
    portable.setattr(process_start, "_thread_count", lambda: 2)
    assert "threads" in why_spawn(ARGUMENTS)


def test_counts_threads_that_a_fork_would_lose():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=count_threads, args=(sender,))
    process.start()
    assert receiver.poll(120)
    *lone, after_openmp = receiver.recv()
    assert lone == [1, 2, 1]
    assert after_openmp > 1
    process.join()


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


def report_child(result) -> None:
    atexit.register(result.send, "exit handler")
    result.send((multiprocessing.get_start_method(), [signal.getsignal(number) for number in SIGNALS]))


def test_a_forked_child_begins_as_a_spawned_one(portable):
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def launch(engine, server_args):
        process = multiprocessing.Process(target=report_child, args=(sender,))
        process.start()
        return process

    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    atexit.register(sender.send, "the parent's exit handler")
    try:
        process = launch_by_fork(launch, object, ARGUMENTS)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        atexit.unregister(sender.send)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert receiver.recv() == ("spawn", [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL])
    assert receiver.recv() == "exit handler"
    assert not receiver.poll()


def test_collection_is_paused_and_comes_back():
    with collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()
    gc.enable()


def group_of(leader: int) -> list[psutil.Process]:
    """Processes of the leader's group, among them those whose parent is gone."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == leader:
                found.append(process)
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it has not ended; a zombie has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def survivors(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still live after a while."""
    deadline = time.monotonic() + PATIENCE
    alive = processes
    while alive and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = [process for process in alive if is_alive(process)]
    return alive


def torch_address(process: psutil.Process) -> str:
    """Where a process has torch's library; every program that loads it anew gets an address of its own."""
    return next(part.addr for part in process.memory_maps(grouped=False) if part.path.endswith("libtorch_cpu.so"))


@pytest.fixture
def forked(tmp_path):
    """A server of this test alone, with all processes of its tree."""
    pool = ServerPool(tmp_path)
    try:
        server = pool.get(*NANO_ARGS, *MTP_ARGS, "--log-level-http", "warning")
        main = psutil.Process(server.process.pid)
        yield server, main, main.children(recursive=True)
    finally:
        pool.stop_all()


@pytest.mark.server
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda ending: ending.name)
def test_a_forked_server_serves_and_leaves_nothing(forked, ending):
    server, main, children = forked
    titles = {" ".join(child.cmdline()).strip() for child in children}
    assert {"sglang::scheduler", "sglang::detokenizer"} <= titles
    # Forked children have libraries where their parent has them; spawned ones load them anew, elsewhere.
    workers = [child for child in children if child.cmdline()[0].startswith("sglang::")]
    assert {torch_address(worker) for worker in workers} == {torch_address(main)} != {torch_address(psutil.Process())}
    assert server.generate("def add(a, b):", max_new_tokens=8)["meta_info"]["completion_tokens"] == 8
    assert all(os.getpgid(child.pid) == main.pid for child in children)
    main.send_signal(ending)
    server.process.wait(STOP_SECONDS + PATIENCE)
    assert survivors([main, *children, *group_of(main.pid)]) == []
