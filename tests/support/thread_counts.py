"""Counts of threads in a process of its own, of one thread. It imports no SGLang, so that spawning it is quick."""

import threading

import numpy
import torch

from sglang_step35.platform import process_start


def count_threads(result) -> None:
    """Send how many threads are counted before, beside and after others."""
    counts = [process_start._thread_count()]
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    counts.append(process_start._thread_count())
    stop.set()
    thread.join()
    numpy.ones((500, 500)) @ numpy.ones((500, 500))  # wakes OpenBLAS's pool
    counts.append(process_start._thread_count())
    torch.set_num_threads(2)
    torch.ones(1000, 1000).add(1).sum()  # wakes OpenMP's pool
    counts.append(process_start._thread_count())
    result.send(counts)
