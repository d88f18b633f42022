"""Bytes of weights that a token reads, from the files alone. Letters: E experts, k chosen for a token."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

HEADER_BYTES = 8  # of a safetensors file, before its JSON
LAYER = re.compile(r"(?:layers|blk)\.(\d+)\.")
ROUTED = re.compile(r"\.moe\.(experts\.\d+\.)?(gate|up|down)_proj\.|ffn_(gate|up|down)_exps\.")
HEADS = ("lm_head.", "output.weight")


@dataclass(frozen=True)
class Traffic:
    """Bytes by part. dense, routed: of each layer, MTP layers last; routed: of all its experts together."""

    layers: int
    experts: int
    chosen: int
    head: int
    dense: dict[int, int]
    routed: dict[int, int]

    def layer(self, index: int, rows: float = 1) -> float:
        """What a pass of `rows` rows reads of a layer, where routing is uniform."""
        return self.dense[index] + self.routed.get(index, 0) * self.touched(rows)

    def touched(self, rows: float) -> float:
        """Share of the experts that `rows` tokens choose, each on its own."""
        return 1 - (1 - self.chosen / self.experts) ** rows

    def step(self, rows: float) -> float:
        """A decode or verify step of the backbone with `rows` rows; the embedding's rows are left out."""
        return self.head + sum(self.layer(index, rows) for index in range(self.layers))

    def drafts(self) -> float:
        """A pass of all MTP layers, each with the head."""
        return sum(self.dense[index] + self.head for index in self.dense if index >= self.layers)


def read(path: Path, fields: dict[str, Any]) -> Traffic:
    """path: a folder of safetensors or a GGUF file. fields: its config.json."""
    dense: Counter[int] = Counter()
    routed: Counter[int] = Counter()
    head = 0
    for name, size in sizes(path).items():
        found = LAYER.search(name)
        if found:
            (routed if ROUTED.search(name) else dense)[int(found[1])] += size
        elif name.startswith(HEADS):
            head += size
    return Traffic(
        fields["num_hidden_layers"], fields["moe_num_experts"], fields["moe_top_k"], head, dict(dense), dict(routed)
    )


def sizes(path: Path) -> dict[str, int]:
    """Bytes of every tensor, by the file's own names."""
    if path.is_file():
        return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(HEADER_BYTES), "little")))
        offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        found |= {name: end - start for name, (start, end) in offsets.items()}
    return found
