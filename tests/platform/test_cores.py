"""Ranks on one host: whose cores, how many threads and how much memory, with no environment variable."""

import os
from types import SimpleNamespace

import pytest
import torch

from sglang_step35.platform import cores
from sglang_step35.platform.portable import PortablePlatform
from tests.support import warm


@pytest.mark.parametrize(
    "count, parts, expected",
    [
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1], [2, 3, 4]]),
        (3, 3, [[0], [1], [2]]),
        (2, 4, [[0], [0], [1], [1]]),
        (1, 3, [[0], [0], [0]]),
    ],
)
def test_parts(count, parts, expected):
    assert [cores.part_of(list(range(count)), i, parts) for i in range(parts)] == expected


@pytest.fixture
def topology(tmp_path, monkeypatch):
    """Two nodes of two cores of two threads, numbered as x86 servers do: 0, 1 | 2, 3 | 4, 5 | 6, 7."""
    for cpu in range(8):
        core = cpu % 4
        folder = tmp_path / f"cpu{cpu}"
        (folder / "topology").mkdir(parents=True)
        (folder / f"node{core // 2}").mkdir()
        (folder / "topology" / "physical_package_id").write_text(f"{core // 2}\n")
        (folder / "topology" / "core_id").write_text(f"{core % 2}\n")
    monkeypatch.setattr(cores, "_CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def test_physical_cores_and_nodes(topology):
    assert [cores.physical_cores(some) for some in (range(8), [0, 4], [0, 1], [2, 3, 6])] == [4, 1, 2, 2]
    assert [cores.numa_nodes(some) for some in (range(8), [0, 5], [3, 6], [1, 2])] == [2, 1, 1, 2]


@pytest.mark.parametrize("asked, expected", [(None, [4, 2, 1]), ("3", [3, 3, 2]), ("16", [8, 4, 2])])
def test_threads(topology, monkeypatch, asked, expected):
    """One on each physical core, unless the user says how many; never two on a hardware thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: int(asked or 8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert [cores.threads_on(some) for some in ([*range(8)], [0, 4, 1, 5], [2, 6])] == expected


def test_nodes_come_one_after_the_other_and_threads_of_a_core_together(topology):
    assert cores.cores_in_order() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_host_that_does_not_say_where_its_cores_are(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "_CPUS", tmp_path)
    usable = sorted(os.sched_getaffinity(0))
    assert cores.cores_in_order() == usable
    assert cores.physical_cores(usable) == len(usable) and cores.numa_nodes(usable) == 1


@pytest.mark.parametrize("text, expected", [("3", [3]), ("0-2,8", [0, 1, 2, 8]), ("1,5-6", [1, 5, 6])])
def test_lists_of_cores(text, expected):
    assert cores.parse_cores(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1-", "1-2-x"])
def test_bad_lists_of_cores(text):
    with pytest.raises(ValueError, match="SGLANG_CPU_OMP_THREADS_BIND"):
        cores.parse_cores(text)


@pytest.fixture
def bound(monkeypatch):
    """What `bind_rank` does to a process of two threads that may use cores 4 to 7."""
    calls = {}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6, 7})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, chosen: calls.update(cores=chosen))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: calls.update(threads=count))

    def bind(index, bound_by=None, **sizes):
        sizes = dict(dp_size=1, tp_size=1, pp_size=1, nnodes=1) | sizes
        monkeypatch.setattr(cores, "get_parallel", lambda: SimpleNamespace(**sizes))
        if bound_by:
            monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", bound_by)
        stock = lambda numa_index, world_size: bound_by.split("|")[numa_index]
        calls.clear()
        return cores.bind_rank(stock, numa_index=index, world_size=0), calls

    return bind


def test_a_rank_takes_its_part(bound):
    assert bound(0, tp_size=2) == ("4,5", {"cores": [4, 5], "threads": 2})
    assert bound(1, tp_size=2) == ("6,7", {"cores": [6, 7], "threads": 2})
    assert bound(5, tp_size=2, pp_size=2, dp_size=2) == ("6", {"cores": [6], "threads": 1})


def test_ranks_of_other_hosts_take_nothing(bound):
    assert bound(1, tp_size=4, nnodes=2) == ("6,7", {"cores": [6, 7], "threads": 2})
    assert bound(0, tp_size=2, nnodes=2) == (None, {"threads": 2})


def test_a_rank_alone_keeps_its_cores(bound):
    assert bound(0) == (None, {"threads": 2})


def test_the_users_own_division_counts(bound):
    assert bound(1, bound_by="4|5-7", tp_size=2) == ("5,6,7", {"cores": [5, 6, 7], "threads": 2})
    assert bound(1, bound_by="all", tp_size=4) == ("5", {"cores": [5], "threads": 1})


@pytest.mark.parametrize("nodes, ranks, expected", [(1, 1, 120), (1, 4, 30), (2, 4, 60), (4, 2, 120)])
def test_memory(nodes, ranks, expected, monkeypatch):
    """What is left of one node, over the ranks on it."""
    monkeypatch.setattr(cores, "get_cpu_ids_by_node", lambda: ["0"] * nodes)
    monkeypatch.setattr(cores, "ranks_here", lambda: ranks)
    assert cores.part_of_memory(120, None, 0) == expected


def compiles() -> bool:
    def backend(graph, inputs):
        raise AssertionError

    import sglang.srt.model_executor.model_runner  # noqa: F401

    try:
        return torch.compile(torch.square, backend=backend)(torch.ones(1)).item() != 1
    except Exception:
        return True


def test_no_rank_compiles():
    """Every process that runs a model on this platform, from its import of SGLang's ModelRunner on."""
    assert not warm.call(compiles)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(attn_dp_size=2), "--enable-dp-attention.* --tp-size alone, or whole replicas by --dp-size"),
        (dict(tp_size=4, ep_size=3), "--ep-size 3 does not divide --tp-size 4"),
        (dict(tp_size=2, ep_size=4), "--ep-size 4 does not divide --tp-size 2"),
    ],
)
def test_refused_before_any_rank_starts(sizes, message):
    arguments = SimpleNamespace(**dict(attention_backend=None, attn_dp_size=1, tp_size=2, ep_size=1) | sizes)
    with pytest.raises(ValueError, match=message):
        PortablePlatform().apply_server_args_defaults(arguments)
