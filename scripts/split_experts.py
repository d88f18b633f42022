"""Rewrite a checkpoint with every routed expert by itself, as quantisers want them.

    python -m scripts.split_experts SOURCE TARGET

StepFun stacks the experts of a layer, `moe.gate_proj.weight` [experts, out, in]; llm-compressor quantises matrices,
`moe.experts.0.gate_proj.weight` [out, in]. This package opens both. One file at a time is in memory; what is no
safetensors file is copied.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_step35.checkpoint.safetensors import INDEX

STACKED = re.compile(r"(.+\.moe)\.((?:gate|up|down)_proj\.\w+)")


def split(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked tensors [E, ...] of a file as E single ones; others as they are."""
    single = {}
    for name, tensor in weights.items():
        match = STACKED.fullmatch(name)
        if match is None:
            single[name] = tensor
        else:
            # Copies: a file may not hold views of one tensor.
            single |= {f"{match[1]}.experts.{e}.{match[2]}": part.clone() for e, part in enumerate(tensor)}
    return single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    args.target.mkdir(parents=True)
    listed: dict[str, str] = {}
    for file in sorted(args.source.iterdir()):
        if file.suffix == ".safetensors":
            weights = split(load_file(file))
            save_file(weights, args.target / file.name, metadata={"format": "pt"})
            listed |= dict.fromkeys(weights, file.name)
        elif file.is_file() and file.name != INDEX:
            shutil.copy(file, args.target)
    (args.target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


if __name__ == "__main__":
    main()
