"""Compiled functions on the threads that torch computes with."""

import ctypes
from functools import cache

import torch


def run(callback, argument: ctypes.Structure, threads: int) -> None:
    """callback(address of the argument), a numba `cfunc`, once on each of up to so many threads, this one among them.

    How many there are is for the callback to find out, as one it is where torch computes by another runtime than
    OpenMP.
    """
    parallel = _parallel() if threads > 1 else None
    if parallel is None:
        callback.ctypes(ctypes.addressof(argument))
    else:
        parallel(callback.address, ctypes.addressof(argument), threads, 0)


@cache
def _parallel():
    """`GOMP_parallel` of the OpenMP that torch has loaded: its threads are awake, others would have to share cores."""
    if not torch.backends.openmp.is_available():
        return None
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if function is not None:
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return function
