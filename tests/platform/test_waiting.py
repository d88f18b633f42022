"""OpenMP's threads sleep soon after they are done, in a process of their own: the setting is the process's."""

import os
import subprocess
import sys

import pytest

# CPU seconds of the whole process while its main thread sleeps between operations of two threads.
MEASURE = """
import os, sys, time, torch
from sglang_step35.platform import waiting
torch.set_num_threads(2)
x = torch.zeros(1 << 18)
print(waiting.shorten_waits() if sys.argv[1] == "short" else None)
torch.add(x, 1)
start = time.process_time()
for _ in range(50):
    torch.add(x, 1)
    time.sleep(0.02)
print(time.process_time() - start)
"""


def measure(which: str, **environment: str) -> tuple[str, float]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", MEASURE, which]
    run = subprocess.run(command, env=kept | environment, check=True, capture_output=True, text=True, timeout=100)
    done, seconds = run.stdout.split()
    return done, float(seconds)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_waits_are_shorter():
    """Spinning costs 50 times what libgomp allows, 3 ms and more."""
    _, long = measure("stock")
    done, short = measure("short")
    assert done == "True" and short < 0.1 < long


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "5")])
def test_the_user_s_choice_stands(name, value):
    done, _ = measure("short", **{name: value})
    assert done == "False"
