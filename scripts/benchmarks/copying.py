"""A Step-3.5 checkpoint that copies: weights set by hand, so that it says what followed when its text last read so.

Nano is too small to quote its prompt, which larger models do all day. Two layers of attention suffice for it (the
induction heads of Elhage et al. 2021): the first fetches the last CONTEXT tokens' codes by position, the second
compares them with those of every earlier place and fetches the token that came there. The MTP layers are the second
layer again, behind a projection that moves the tokens up by one, so that drafts copy as well and as far ahead as MTP
can.

Letters: C channels of a code, D head_dim, H hidden size, V vocabulary. A hidden state is, in C channels each, the codes
of x_t, x_{t-1}, .. x_{t-CONTEXT} and of the token foretold, then one channel that is always 1.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import CheckpointShape, make_checkpoint

C, CONTEXT, ROTATED = 60, 8, 32
FORETOLD, ONE = (CONTEXT + 1) * C, (CONTEXT + 2) * C
THETA = 100.0
SHAPE = CheckpointShape(
    num_layers=2,
    dense_layers=2,
    vocab_size=2048,
    hidden_size=640,
    heads=CONTEXT,
    kv_groups=1,
    sliding_heads=1,
    sliding_kv_groups=1,
    head_dim=ROTATED + CONTEXT * C,
    window=4096,
    dense_size=64,
    limits=False,
    dtype="bfloat16",
)
# What RMSNorm divides by: of an embedding, of the first layer's output, of the last one's.
EMBEDDED, FETCHED, DONE = (math.sqrt((blocks * C + 1) / SHAPE.hidden_size) for blocks in (1, CONTEXT + 1, CONTEXT + 2))
POSITION_SCALE, CONTENT_SCALE, LOGIT = 5.0, 3.0, 0.5


def write(directory: Path) -> Path:
    """The checkpoint, with nano's tokenizer."""
    make_checkpoint(directory, SHAPE)
    config = json.loads((directory / "config.json").read_text())
    count = len(config["layer_types"])
    config |= {"use_moe": False, "moe_layers_enum": "", "yarn_only_types": [], "rope_scaling": None}
    config |= {"rope_theta": [THETA] * count, "partial_rotary_factors": [ROTATED / SHAPE.head_dim] * count}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    weights = {name: torch.zeros_like(w) for name, w in load_file(directory / "model.safetensors").items()}
    _fill(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _fill(weights: dict[str, Tensor]) -> None:
    codes = torch.randint(0, 2, (SHAPE.vocab_size, C), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    embed = weights["model.embed_tokens.weight"]
    embed[:, :C], embed[:, ONE] = codes.to(embed.dtype), 1.0
    heads = [name for name in weights if name.endswith(("lm_head.weight", "shared_head.output.weight"))]
    for name in heads:
        weights[name][:, FORETOLD:ONE] = (LOGIT * codes).to(embed.dtype)
    _fetch_by_position(weights, "model.layers.0.")
    for index in range(1, SHAPE.num_layers + SHAPE.num_mtp):
        _fetch_by_content(weights, f"model.layers.{index}.")
        if index >= SHAPE.num_layers:
            _move_up(weights[f"model.layers.{index}.eh_proj.weight"])


def _fetch_by_position(weights: dict[str, Tensor], prefix: str) -> None:
    """Head j - 1 attends to the token j places back: its query is the key turned by j steps."""
    attention = _attention(weights, prefix, POSITION_SCALE)
    half, dim = ROTATED // 2, SHAPE.head_dim
    angles = THETA ** -(torch.arange(half) / half)
    attention["k"][:half, ONE] = 1.0
    attention["v"][:C, :C] = torch.eye(C)
    for j in range(1, CONTEXT + 1):
        first = (j - 1) * dim
        attention["q"][first : first + half, ONE] = (j * angles).cos()
        attention["q"][first + half : first + ROTATED, ONE] = -(j * angles).sin()
        attention["o"][j * C : (j + 1) * C, first : first + C] = torch.eye(C) * EMBEDDED


def _fetch_by_content(weights: dict[str, Tensor], prefix: str) -> None:
    """Attend to the place before which CONTEXT tokens were most like the present ones, and foretell its token."""
    attention = _attention(weights, prefix, CONTENT_SCALE)
    size = CONTEXT * C
    attention["q"][ROTATED:, :size] = torch.eye(size)
    attention["k"][ROTATED:, C : C + size] = torch.eye(size)
    attention["v"][:C, :C] = torch.eye(C)
    attention["o"][FORETOLD:ONE, :C] = torch.eye(C) * FETCHED


def _attention(weights: dict[str, Tensor], prefix: str, scale: float) -> dict[str, Tensor]:
    """A layer's projections [out, in] by letter, its gates open and its queries and keys of this scale."""
    prefix += "self_attn."
    weights[f"{prefix}g_proj.weight"][:, ONE] = 20.0
    for letter in "qk":
        weights[f"{prefix}{letter}_norm.weight"][:] = scale - 1  # zero-centred
    return {letter: weights[f"{prefix}{letter}_proj.weight"] for letter in "qkvo"}


def _move_up(projection: Tensor) -> None:
    """[H, 2H]: the newest token's embedding first, then the tokens that the hidden state holds, without the eldest."""
    size, hidden = CONTEXT * C, SHAPE.hidden_size
    projection[:C, :C] = torch.eye(C) * EMBEDDED
    projection[C : C + size, hidden : hidden + size] = torch.eye(size) * DONE
    projection[ONE, ONE] = EMBEDDED
