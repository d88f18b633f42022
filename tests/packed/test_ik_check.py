"""Why ggml's kernels are not used: each lack in words with its remedy, and a crash of the library harms nobody."""

import faulthandler
import importlib.metadata
import os
import signal
import time
from functools import partial

import pytest

from sglang_step35.packed import ik_check, ik_library


@pytest.fixture(autouse=True)
def _ask_again():
    ik_check.usable.cache_clear()
    yield
    ik_check.usable.cache_clear()


def test_usable_here():
    assert ik_check.why_not() is None and ik_check.usable()


def test_another_system(monkeypatch):
    monkeypatch.setattr(ik_check.platform, "machine", lambda: "riscv64")
    assert ik_check.why_not() == "ik-llama-cpp-python has no wheel for linux on riscv64"


def test_an_older_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(ik_check.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(ik_check, "CPUINFO", tmp_path / "cpuinfo")
    ik_check.CPUINFO.write_text("processor\t: 0\nflags\t\t: fpu avx f16c\nflags\t\t: fpu avx f16c avx2 fma\n")
    assert ik_check.why_not() == "ik-llama-cpp-python needs a CPU with avx2, fma"


@pytest.mark.parametrize(("found", "reason"), [(None, "is not installed"), ("0.1.6", "is 0.1.6, made for 0.1.5")])
def test_another_version(monkeypatch, found, reason, caplog):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert not ik_check.usable()
    (record,) = caplog.records
    assert f"ik-llama-cpp-python {reason}: pip install ik-llama-cpp-python==0.1.5" in record.getMessage()


def test_a_self_test_that_finds_other_numbers(monkeypatch, capfd):
    run = ik_check.ik_kernel.experts
    monkeypatch.setattr(ik_check.ik_kernel, "experts", lambda *arguments: run(*arguments[:-1], None))
    assert "self-test of ik-llama-cpp-python 0.1.5 failed: reinstall it (pip install" in ik_check.why_not()
    assert "something else than plain torch" in capfd.readouterr().err


def test_a_file_that_is_no_library(monkeypatch, tmp_path):
    (tmp_path / "libggml.so").write_bytes(b"something else")
    monkeypatch.setattr(ik_library, "library_path", lambda: tmp_path / "libggml.so")
    ik_library.library.cache_clear()
    assert "failed" in ik_check.why_not()
    ik_library.library.cache_clear()


def test_other_structures(monkeypatch):
    monkeypatch.setattr(ik_library, "_OBJECT_BYTES", 40)
    with pytest.raises(RuntimeError, match=r"libggml.so is of another version: struct ggml_tensor has another size"):
        ik_library.Library(ik_library.library_path())


def test_a_crash_stays_in_the_child():
    """As a failed assertion of ggml or an instruction that the CPU lacks would end it."""
    for number in (signal.SIGABRT, signal.SIGILL):
        assert ik_check.in_child(partial(_end_by, number), 10) == f"was ended by {number.name}"
    assert ik_check.in_child(lambda: time.sleep(60), 0.1) == "did not end within 0.1 s"
    assert ik_check.in_child(lambda: None, 10) is None


def _end_by(number: signal.Signals) -> None:
    faulthandler.disable()  # pytest's
    os.kill(os.getpid(), number)
