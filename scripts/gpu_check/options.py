"""What a step is given, and the files steps leave for each other in OUT."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPARE_TOKENS = 1024
DEFAULT_OUT = Path("build/gpu_check")


class Refused(RuntimeError):
    """A step cannot run here; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Setting:
    """tiny: a checkpoint, prompts and concurrency small enough for a CPU. moe_layers: None asks the planner."""

    out: Path = DEFAULT_OUT
    device: str = "cuda"
    tiny: bool = False
    moe_layers: int | None = None

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"

    @property
    def concurrency(self) -> tuple[int, ...]:
        return (1, 2) if self.tiny else (1, 8, 32)

    @property
    def prompts(self) -> dict[str, int]:
        """Tokens of a prompt by its name in tables."""
        return {"64": 64, "256": 256} if self.tiny else {"1K": 1024, "16K": 16384}

    @property
    def tokens(self) -> int:
        """Output tokens of a request."""
        return 16 if self.tiny else 256

    @property
    def context(self) -> int:
        """Tokens a request takes at most: the longest prompt and its answer, and some to spare for the other steps."""
        return max(self.prompts.values()) + self.tokens + SPARE_TOKENS

    def save(self, step: str, result: dict[str, Any]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{step}.json").write_text(json.dumps(result, indent=1) + "\n")

    def load(self, step: str) -> dict[str, Any] | None:
        """What a step saved, None where it has not run."""
        file = self.out / f"{step}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def need(self, step: str) -> dict[str, Any]:
        found = self.load(step)
        if found is None:
            made_by = "setup" if step == "machine" else step
            raise Refused(f"{self.out / step}.json is missing: run the step {made_by} first")
        return found


def parser(about: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("step", nargs="?", metavar="STEP", help="without one: the list")
    add("--out", type=Path, default=DEFAULT_OUT, help=f"where checkpoint and results go (default: {DEFAULT_OUT})")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the steps themselves, with --tiny")
    add("--tiny", action="store_true", help="a tiny checkpoint, short prompts, few requests")
    add("--moe-layers", type=int, metavar="N", help="layers of experts (default: as many as fit)")
    add("--names", action="store_true", help="only the names of all steps, for `all`")
    return made


def check_device(setting: Setting, cuda: bool) -> None:
    """Raises Refused. cuda: whether torch sees a CUDA device."""
    if setting.device == "cpu" and not setting.tiny:
        raise Refused("--device cpu serves the tiny checkpoint only: add --tiny")
    if setting.device == "cuda" and not cuda:
        raise Refused("no CUDA device here: use a machine with a GPU, or try the steps with --tiny --device cpu")
