"""How long OpenMP's threads spin for their next work, without an environment variable.

libgomp, which torch and ggml's kernels share, lets a waiting thread spin for 300,000 rounds, 3 to 17 ms, before it
sleeps. Beside another busy process on the same cores the spinning thread keeps the core from the one it waits for: on
two cores an addition of a million floats takes 12 ms instead of 0.3. `OMP_WAIT_POLICY` is read when torch is imported,
long before any plug-in is. But libgomp spins for 100 rounds only where it manages more threads than there are CPUs
(libgomp/config/linux/wait.h), so a second team of threads, asleep for good, shortens every wait.
"""

import ctypes
import os
import threading

import torch

_SET_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def after_binding(bound, *_, **__):
    """After `init_threads_binding`, which settles how many threads compute in a scheduler's process."""
    shorten_waits()
    return bound


def shorten_waits() -> bool:
    """Make this process's OpenMP threads sleep soon; whether that was done.

    Not where the user chose a policy, where one thread waits for nobody, or without libgomp.
    """
    threads = torch.get_num_threads()
    if threads == 1 or any(name in os.environ for name in _SET_BY_USER):
        return False
    libraries = ctypes.CDLL(None)  # torch loads libgomp for everybody
    if not (hasattr(libraries, "GOMP_parallel") and hasattr(libraries, "omp_get_num_procs")):
        return False
    started = threading.Event()
    team = max(2, (os.cpu_count() or 1) - threads + 2)
    threading.Thread(target=_keep_team, args=(libraries, team, started), name="idle OpenMP team", daemon=True).start()
    started.wait()
    return True


def _keep_team(libraries: ctypes.CDLL, team: int, started: threading.Event) -> None:
    """Start a team of this many threads, which lives as long as this thread. All it runs is a query."""
    libraries.GOMP_parallel(ctypes.cast(libraries.omp_get_num_procs, ctypes.c_void_p), None, team, 0)
    started.set()
    threading.Event().wait()
