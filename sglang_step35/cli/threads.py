"""What doctor says about the threads of a CPU server. Pure: the machine is given."""


def advice(hardware: int, threads: int, nodes: int, asked: str | None) -> list[tuple[str, str | None]]:
    """(text, what to do where something is wrong) for each line.

    hardware: hardware threads this process may use. threads: physical cores among them. nodes: NUMA nodes they belong
    to. asked: OMP_NUM_THREADS, None where it is not set.
    """
    where = f"{threads} physical cores, {hardware} hardware threads, {nodes} NUMA node{'s' if nodes > 1 else ''}"
    lines = [(f"{where}; {_computing(threads, asked)}", _mend(threads, asked))]
    if nodes > 1:
        split = f"--tp-size {nodes} gives each rank a node and its memory"
        lines.append((f"{split}; one rank alone: start it by numactl --interleave=all", None))
    return lines


def _computing(threads: int, asked: str | None) -> str:
    if asked is None:
        return f"a server computes with {threads} threads (OMP_NUM_THREADS is not set)"
    idle = asked.isdecimal() and 0 < int(asked) < threads
    return f"OMP_NUM_THREADS={asked}" + (", which suits nano only: a larger model wants them all" if idle else "")


def _mend(threads: int, asked: str | None) -> str | None:
    if asked is None or (asked.isdecimal() and 0 < int(asked) <= threads):
        return None
    return f"unset OMP_NUM_THREADS, or set it to the number of physical cores, {threads}"
