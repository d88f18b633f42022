"""Weights in pages of 2 MB, where Linux keeps such for programs that ask (`transparent_hugepage/enabled` says madvise).

A pass reads every weight once. From pages of 4 KB a core reads them 5 to 30 % more slowly (Zen 4, a virtual machine):
it waits for page tables, and what the CPU fetches ahead ends with each page.
"""

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path

from torch import Tensor

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_WHEN_WRITTEN, _NOW = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE


def use(tensor: Tensor) -> None:
    """Ask for memory of torch's own that is to be written, which costs nothing; what was written already, or lies in
    recycled memory, is moved at about 1 GB/s.

    Not for mapped files. Small tensors stay as they are, and what the system cannot or does not want to move.
    """
    size = page_size()
    if not size or tensor.device.type != "cpu" or tensor.nbytes < size:
        return
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    _advise(start // mmap.PAGESIZE * mmap.PAGESIZE, end, _WHEN_WRITTEN)
    _advise(start // size * size, -(-end // size) * size, _NOW)  # with neighbours in the first and the last page


@cache
def page_size() -> int:
    """Bytes of a huge page; 0 where there are none."""
    if sys.platform != "linux":
        return 0
    try:
        never = "[never]" in (_SETTINGS / "enabled").read_text()
        return 0 if never else int((_SETTINGS / "hpage_pmd_size").read_text())
    except OSError:
        return 0


def _advise(start: int, end: int, advice: int) -> None:
    """Pages stay small where the kernel refuses."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
