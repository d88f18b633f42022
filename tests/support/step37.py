"""Step-3.7 checkpoints: a Step-3.5 one with its config one level down, its names under a prefix and vision tensors.

The layouts are those of transformers' `step3p7` (renames in its conversion table) and of StepFun's files.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STEPFUN = ("model.", ("vision_model.", "vit_large_projector."))
TRANSFORMERS = ("model.language_model.", ("model.vision_model.", "model.multi_modal_projector."))
VISION_CONFIG = {"model_type": "perception_encoder", "width": 1536, "layers": 47, "hidden_act": "quick_gelu"}


def outer_fields(text: dict[str, Any], **more: Any) -> dict[str, Any]:
    """config.json of Step-3.7 around the fields of a Step-3.5 one."""
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "text_config": text,
        "vision_config": VISION_CONFIG,
        "understand_projector_stride": 2,
        "projector_bias": False,
        "image_token_id": 128001,
        "im_start_token": "<im_start>",
        **more,
    }


def as_step37(source: Path, target: Path, names: tuple[str, tuple[str, ...]] = TRANSFORMERS) -> Path:
    """Write the one-file Step-3.5 checkpoint `source` as a Step-3.7 one and return it."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = outer_fields(json.loads((source / "config.json").read_text()))
    (target / "config.json").write_text(json.dumps(config))
    prefix, vision = names
    weights = {
        f"{prefix}{name.removeprefix('model.')}" if name.startswith("model.") else name: weight
        for name, weight in load_file(source / "model.safetensors").items()
    }
    weights |= {f"{module}weight": torch.ones(2, 3) for module in vision}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target
