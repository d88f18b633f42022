"""Writing and reading the checkpoint folder: bf16 weights under the real checkpoint's names, and its configs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from scripts.nano.config import BOS, END_OF_TEXT, EOS, IM_END, Shape, hf_config
from scripts.nano.model import NanoStep


@torch.no_grad()
def round_to_bf16(model: NanoStep) -> None:
    """Makes the float32 model hold exactly the values that will be stored."""
    for p in model.parameters():
        p.copy_(p.bfloat16())


def save_weights(model: NanoStep, out: Path) -> None:
    """Written beside and renamed, so that a reader never meets half a file. The router bias stays float32 (of a
    bf16 value) as engines keep it; the heads and embeddings of the MTP layers are the backbone's and left out."""
    tensors = {
        name: (t if name.endswith("router_bias") else t.bfloat16()).contiguous()
        for name, t in model.state_dict().items()
    }
    partial = out / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, out / "model.safetensors")


def load_weights(shape: Shape, out: Path) -> NanoStep:
    model = NanoStep(shape)
    model.load_state_dict({n: t.float() for n, t in load_file(out / "model.safetensors").items()})
    return model.eval()


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def save_configs(shape: Shape, out: Path) -> None:
    write_json(out / "config.json", hf_config(shape))
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, END_OF_TEXT, IM_END]}
    write_json(out / "generation_config.json", generation)
