"""Compiled functions on disk: found again, and never those of other sources."""

import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
from numba import types
from sglang_step35.numba_cache import callback
from constants import FACTOR

def compiled(sources):
    @callback(types.int64(types.int64))
    def multiply(x):
        return x * FACTOR if sources else 0
    return multiply
"""


def run(folder: Path, sources: int) -> tuple[int, int]:
    """In a process of its own: 7 times the factor, and how often the cache was hit."""
    code = f"from module import compiled; f = compiled({sources}); print(f.ctypes(7), f.cache_hits)"
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return tuple(map(int, found.stdout.split()))


def test_a_function_is_compiled_anew_where_only_what_it_reads_elsewhere_changed(tmp_path):
    (tmp_path / "module.py").write_text(MODULE)
    (tmp_path / "constants.py").write_text("FACTOR = 3")
    assert run(tmp_path, sources=1) == (21, 0)
    assert run(tmp_path, sources=1) == (21, 1)
    (tmp_path / "constants.py").write_text("FACTOR = 5")
    assert run(tmp_path, sources=3) == (35, 0)
    assert run(tmp_path, sources=3) == (35, 1)


def test_the_digest_changes_with_each_file(tmp_path, monkeypatch):
    numba_cache = pytest.importorskip("sglang_step35.numba_cache")
    (tmp_path / "packed").mkdir()
    files = tmp_path / "a.py", tmp_path / "packed" / "b.py"
    monkeypatch.setattr(numba_cache, "__file__", str(tmp_path / "numba_cache.py"))
    seen = set()
    for file in files:
        for other in files:
            other.write_text(f"{other == file}")
        seen.add(numba_cache.digest("a", "packed.b"))
    assert len(seen) == 2 and all(seen)


def test_without_a_place_for_it_it_is_compiled_all_the_same(monkeypatch):
    from numba import types
    from numba.core import caching

    from sglang_step35.numba_cache import callback

    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert callback(types.int64(types.int64))(lambda x: x + 1).ctypes(1) == 2
