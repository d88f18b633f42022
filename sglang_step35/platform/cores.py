"""Ranks on a host: which cores, how many threads and how much memory each of them takes.

SGLang gives every rank a NUMA node of its own and asks for SGLANG_CPU_OMP_THREADS_BIND where there are fewer.
"""

import logging
import os
import re
from pathlib import Path

import torch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import get_cpu_ids_by_node

_CPUS = Path("/sys/devices/system/cpu")
logger = logging.getLogger(__name__)


def bind_rank(stock, *, numa_index: int, world_size: int) -> str | None:
    """Around `init_threads_binding`: bind this process to its part of the cores it may use, and say which.

    SGLANG_CPU_OMP_THREADS_BIND still decides where it is set. A rank alone on its host keeps every core; ranks
    share cores where there are too few. Threads: see `threads_on`.
    """
    ranks = ranks_here()
    if os.environ.get("SGLANG_CPU_OMP_THREADS_BIND", "all") != "all":
        cores = parse_cores(stock(numa_index=numa_index, world_size=world_size))
    elif ranks == 1:
        torch.set_num_threads(threads_on(sorted(os.sched_getaffinity(0))))
        return None
    else:
        cores = part_of(cores_in_order(), numa_index % ranks, ranks)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads_on(cores))
    bound = ",".join(map(str, cores))
    logger.info("rank %d of the %d on this host: cores %s", numa_index, ranks, bound)
    return bound


def threads_on(cores: list[int]) -> int:
    """Threads to compute with: what OMP_NUM_THREADS says, at most one for each of the hardware threads `cores`.

    Without it one for each physical core: two on a core wait for the same memory.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return min(torch.get_num_threads(), len(cores))
    return physical_cores(cores)


def physical_cores(cores: list[int]) -> int:
    """Physical cores that the hardware threads `cores` belong to."""
    return len({_place(_CPUS / f"cpu{core}") or core for core in cores})


def numa_nodes(cores: list[int]) -> int:
    """Nodes that the hardware threads `cores` belong to."""
    return len({_node(_CPUS / f"cpu{core}") for core in cores})


def part_of_memory(available: int, configurator, pre_model_load_memory) -> int:
    """After `KVCacheConfigurator._profile_available_bytes`: one rank's part of what is left of its NUMA node."""
    ranks = ranks_here()
    return available * min(ranks, len(get_cpu_ids_by_node())) // ranks


def ranks_here() -> int:
    """Scheduler processes of this server on this host."""
    parallel = get_parallel()
    return max(1, parallel.dp_size * parallel.tp_size * parallel.pp_size // parallel.nnodes)


def part_of(cores: list[int], index: int, parts: int) -> list[int]:
    """One of `parts` equal runs of the cores; never empty."""
    start, end = (len(cores) * i // parts for i in (index, index + 1))
    return cores[start : max(end, start + 1)]


def cores_in_order() -> list[int]:
    """The cores this process may use: NUMA nodes one after the other, hardware threads of one core together."""
    return sorted(os.sched_getaffinity(0), key=lambda core: (*_place(_CPUS / f"cpu{core}"), core))


def _place(folder: Path) -> tuple[int, ...]:
    """(NUMA node, socket, core); empty where the kernel does not say."""
    files = [folder / "topology" / name for name in ("physical_package_id", "core_id")]
    return (_node(folder), *(int(file.read_text()) for file in files)) if files[1].exists() else ()


def _node(folder: Path) -> int:
    return min((int(node.name.removeprefix("node")) for node in folder.glob("node[0-9]*")), default=0)


def parse_cores(text: str) -> list[int]:
    """ "0-2,8" -> [0, 1, 2, 8]. Raises ValueError naming the variable."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"SGLANG_CPU_OMP_THREADS_BIND: {text!r} is not a list of cores such as 0-15,32")
    ends = [part.partition("-") for part in text.split(",")]
    return [core for first, _, last in ends for core in range(int(first), int(last or first) + 1)]
