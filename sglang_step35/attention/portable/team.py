"""Compiled functions on the threads that torch computes with."""

import ctypes
from functools import cache

import torch


def run(callback, argument: ctypes.Structure, threads: int) -> None:
    """callback(address of the argument), a numba `cfunc`, on each of so many threads, this one among them.

    Where torch computes by another runtime than OpenMP it is this one alone: the callback shares out the work itself.
    """
    parallel = _parallel()
    if parallel is None:
        callback.ctypes(ctypes.addressof(argument))
    else:
        parallel(callback.address, ctypes.addressof(argument), threads, 0)


@cache
def _parallel():
    """`GOMP_parallel` of the OpenMP that torch has loaded: threads of another pool would compete with its own."""
    if not torch.backends.openmp.is_available():
        return None
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if function is not None:
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return function
