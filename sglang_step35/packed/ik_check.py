"""Whether ggml's kernels can be used here: asked before anything of the library is loaded into this process."""

import importlib.metadata
import logging
import os
import platform
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from sglang_step35.packed import ik_kernel, plain
from sglang_step35.packed.ggml import TYPES, GGMLTensor
from sglang_step35.packed.ik_library import PACKAGE, VERSION

INSTALL = f"pip install {PACKAGE}=={VERSION}"
# What the wheels are compiled for, by `platform.machine()`, as /proc/cpuinfo calls it.
NEEDED = {"x86_64": {"avx2", "fma", "f16c"}, "aarch64": {"asimd", "asimddp"}}
CPUINFO = Path("/proc/cpuinfo")
TEST_SECONDS = 30
CLOSE = 0.02  # relative error of a product whose activations were rounded to 8 bits; 0.006 seen
logger = logging.getLogger(__name__)


@cache
def usable() -> bool:
    """Whether `ik_kernel` may be called; the reason against it is logged, once."""
    reason = why_not()
    if reason is not None:
        logger.warning("products by packed weights run in plain torch, slowly: %s", reason)
    return reason is None


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it, which torch uses and the wheel does not."""
    return not _cpu_flags().isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})


def why_not() -> str | None:
    """Why the library cannot be used, and what to do about it; None when it can. Runs its self-test in a child."""
    return _lacking() or _failing()


def _lacking() -> str | None:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in NEEDED:
        return f"{PACKAGE} has no wheel for {sys.platform} on {machine}"
    missing = NEEDED[machine] - _cpu_flags()
    if missing:
        return f"{PACKAGE} needs a CPU with {', '.join(sorted(missing))}"
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed: {INSTALL}"
    return None if version == VERSION else f"{PACKAGE} is {version}, made for {VERSION}: {INSTALL}"


def _cpu_flags() -> set[str]:
    """The instruction sets of the first CPU."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def _failing() -> str | None:
    outcome = in_child(self_test, TEST_SECONDS)
    return None if outcome is None else f"the self-test of {PACKAGE} {VERSION} {outcome}: reinstall it ({INSTALL})"


def self_test() -> None:
    """Products and experts of random Q8_0 weights against plain torch. Raises AssertionError where they differ."""
    random = torch.Generator().manual_seed(0)
    gate, up, down = (_random_weights(random, 3, *shape) for shape in ((32, 64), (32, 64), (64, 32)))
    x, weights = torch.randn(5, 64, generator=random), torch.rand(5, 2, generator=random)
    parts = gate[0], up[1]
    _assert_close(ik_kernel.linear(x, parts), plain.linear(x, parts))
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [-1, 1], [-1, -1]])
    both = (run(x, gate, up, down, weights, ids, 0.5) for run in (ik_kernel.experts, plain.experts))
    _assert_close(*both)


def _random_weights(random: torch.Generator, *shape: int) -> GGMLTensor:
    """Q8_0 blocks of random integers with one scale."""
    *leading, columns = shape
    codes = torch.randint(0, 256, (*leading, columns // 32, 32), generator=random, dtype=torch.uint8)
    scale = torch.tensor([0.005], dtype=torch.float16).view(torch.uint8).expand(*codes.shape[:-1], 2)
    return GGMLTensor(TYPES["Q8_0"], torch.cat((scale, codes), dim=-1).flatten(-2))


def _assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    if not float((found - expected).norm()) <= CLOSE * float(expected.norm()):
        raise AssertionError("ggml's kernels compute something else than plain torch")


def in_child(function: Callable[[], None], seconds: float) -> str | None:
    """Run it in a fork of this process; what went wrong, in words, or None. A crash ends the child alone."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # this process has none of its parent's other threads
            function()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"did not end within {seconds:g} s"
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return None if code == 0 else "failed"
