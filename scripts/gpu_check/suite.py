"""The tests marked `gpu`, in parts of less than eight minutes."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from scripts.gpu_check.options import Setting

# The tests with servers by the attention backend in their names; the last part takes what no other does.
PARTS = {
    "tests": ("-m", "gpu and not server"),
    "tests-flashinfer": ("-m", "gpu and server", "-k", "flashinfer"),
    "tests-fa3": ("-m", "gpu and server", "-k", "fa3 and not flashinfer"),
    "tests-triton": ("-m", "gpu and server", "-k", "triton and not (flashinfer or fa3)"),
    "tests-server": ("-m", "gpu and server", "-k", "not (flashinfer or fa3 or triton)"),
}
NOTHING_COLLECTED = 5  # pytest's exit status


def outcomes(junit: str) -> dict[str, int]:
    """Counts by outcome of a JUnit report: passed, failed, skipped."""
    found: Counter = Counter(passed=0, failed=0, skipped=0)
    for case in ElementTree.fromstring(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        found["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return dict(found)


def run(setting: Setting, part: str) -> dict:
    setting.out.mkdir(parents=True, exist_ok=True)
    report = Path(setting.out / f"{part}.xml").resolve()
    command = [sys.executable, "-m", "pytest", "-q", *PARTS[part], f"--junitxml={report}"]
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2])
    counts = outcomes(report.read_text()) if report.is_file() else {}
    return {"exit": 0 if done.returncode == NOTHING_COLLECTED else done.returncode, **counts}
