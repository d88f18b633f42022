"""What the benchmark measures, in pieces that run on their own: names, order, selection, one file of results."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby, product
from pathlib import Path
from typing import Any

from sglang_step35.bench.servers import MTP_ARGS

FORMATS = ("bf16", "fp8", "Q8_0", "Q4_0")
LLAMA_FORMATS = ("bf16", "Q8_0", "Q4_0")
SLICES = ("Q4_K", "int4")
MODES = {"off": (), "mtp": MTP_ARGS, "adaptive": (*MTP_ARGS, "--speculative-adaptive")}
CLIENTS, PROMPTS = (1, 4, 16), (512, 4096)
TOKENS = {1: 96, 4: 64, 16: 32}  # decoded by each of so many clients
TURNS = 3  # of cells that are compared
TAIL = 64  # tokens of a long prompt that several clients do not share
LLAMA_LONGEST = 20_000  # prompt tokens of all slots together, which share none: minutes otherwise


@dataclass(frozen=True)
class Cell:
    """One rate of one engine. clients: requests at once. prompt: tokens of each."""

    engine: str
    form: str
    mode: str
    clients: int
    prompt: int

    @property
    def name(self) -> str:
        return f"{self.engine}/{self.form}/{self.mode}/c{self.clients}/p{self.prompt}"

    @property
    def shared(self) -> bool:
        """Whether the clients' prompts differ in their last TAIL tokens only."""
        return self.clients > 1 and self.prompt == max(PROMPTS)


def cells(llama: bool) -> list[Cell]:
    """In an order that starts every server once, while those of one format stay alive."""
    found = []
    for form, prompt, clients in product(FORMATS, PROMPTS, CLIENTS):
        found += [Cell("ours", form, mode, clients, prompt) for mode in MODES]
        if llama and form in LLAMA_FORMATS and clients * prompt <= LLAMA_LONGEST:
            found.append(Cell("llama.cpp", form, "off", clients, prompt))
    return found + [Cell("transformers", "bf16", "off", 1, prompt) for prompt in PROMPTS]


def in_turns(plan: Iterable[Cell], turns: int) -> Iterator[list[tuple[int, Cell]]]:
    """Cells that are compared, each `turns` times: (turn, cell), another one first in every turn."""
    alone = lambda cell: (cell.engine == "transformers", cell.form, cell.clients, cell.prompt)
    for _, group in groupby(plan, key=alone):
        compared = list(group)
        yield [(turn, compared[(turn + i) % len(compared)]) for turn in range(turns) for i in range(len(compared))]


def extras() -> list[str]:
    """Names of the pieces that are not cells, in order."""
    files = [f"write/{form}" for form in (*FORMATS, *SLICES)]
    return ["bandwidth", *files, *(f"layers/{form}" for form in SLICES)]


def chosen(name: str, patterns: list[str] | None) -> bool:
    """patterns: shell patterns, or beginnings up to a `/`; None: all."""
    return patterns is None or any(
        fnmatchcase(name, pattern) or name.startswith(pattern.rstrip("/") + "/") for pattern in patterns
    )


class Results:
    """One JSON file that grows with every piece; a piece that runs again replaces its former result."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, value: Any) -> None:
        self.found[name] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1, sort_keys=True) + "\n")
        partial.replace(self.path)
