"""The rate at which this machine's threads read memory: what kernels of decode steps can reach at best.

python -m scripts.benchmarks.real_width.bandwidth
"""

import time

import torch
from torch import Tensor

BYTES = 1 << 30  # of one buffer: larger than any cache
ROUNDS = 7


def measure(threads: int) -> float:
    """GB/s of the best pass over the buffer."""
    torch.set_num_threads(threads)
    buffer = torch.zeros(BYTES // 4)
    return round(max(rate(buffer) for _ in range(ROUNDS)), 2)


def rate(buffer: Tensor) -> float:
    """GB/s of one pass."""
    started = time.perf_counter()
    buffer.sum()
    return buffer.nbytes / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    print(measure(torch.get_num_threads()))
