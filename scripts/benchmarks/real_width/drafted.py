"""The 0.9B checkpoint of the benchmark: a text that is known, and drafts that come true as often as wanted.

Its text is one cycle over all tokens: the head reads the embedding of token x as a vote for its successor. The layers
cost their time and add little, because what they write into the residual stream is scaled down. MTP layer i passes on
the embedding of its newest token, so its draft is that token's successor, unless one neuron of its dense network
objects: it reads a direction m of the embedding, z = m . x, and adds c(z) times the embedding of one fixed token, whose
successor becomes the draft where c(z) > 1. z is normal over the tokens and c rises, so a share of the tokens, chosen by
c's scale, gets a wrong draft, near the threshold an uncertain one; layers object independently.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np

from scripts.benchmarks.real_width.checkpoint import Matrix, matrices
from sglang_step35.assets import PUBLISHED_CONFIG

# Share of rounds in which nano's first, second and third draft is accepted on code (scripts/results/mtp.json).
NANO = (0.712, 0.595, 0.504)
LAYERS, MTP = 12, 3
RESIDUAL = 0.05  # of what layers would add
VOTE = 12.0  # the logit of the next token
SLOPE = 4.0  # of the neuron's gate
RESERVED = 8  # tokens outside the cycle: special ones
OBJECTED = RESERVED  # the token whose successor wrong drafts are


def fields(**changed) -> dict[str, Any]:
    """config.json: the published one at a quarter of its widths, 12 + 3 layers, 64 experts of 320."""
    config = json.loads(PUBLISHED_CONFIG.read_text())
    full = [index % 4 == 0 and index < LAYERS for index in range(LAYERS + MTP)]
    kinds = ["full_attention" if is_full else "sliding_attention" for is_full in full]
    small = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "vocab_size": 32_768,
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": MTP,
        "layer_types": kinds,
        "rope_theta": [5e6 if is_full else 1e4 for is_full in full],
        "partial_rotary_factors": [0.5 if is_full else 1.0 for is_full in full],
        "swiglu_limits": [0.0] * len(kinds),
        "swiglu_limits_shared": [0.0] * len(kinds),
        "num_attention_heads": 16,
        "num_attention_groups": 2,
        "attention_other_setting": config["attention_other_setting"]
        | {"num_attention_heads": 24, "num_attention_groups": 2},
        "moe_layers_enum": ",".join(map(str, range(1, LAYERS))),
        "moe_num_experts": 64,
        "moe_intermediate_size": 320,
        "share_expert_dim": 320,
        "eos_token_id": [1],
    }
    return config | small | changed


def text(size: int, start: int, count: int) -> list[int]:
    """`count` tokens of the cycle over a vocabulary of `size`, from place `start` on."""
    order = _order(size)
    return order[np.arange(start, start + count) % len(order)].tolist()


def entries(config: dict[str, Any], rates: tuple[float, ...] = NANO) -> Iterator[Matrix]:
    """All tensors. rates[i]: share of rounds whose draft i + 1, and so all before it, is to be accepted."""
    hidden = config["hidden_size"]
    embedding = next(m for m in matrices(config) if m.name == "model.embed_tokens.weight").part()
    chances = [now / before for now, before in zip(rates, (1.0, *rates), strict=False)]
    for matrix in matrices(config):
        layer = int(matrix.name.split(".")[2]) - config["num_hidden_layers"] if ".layers." in matrix.name else -1
        if matrix.name.endswith(("o_proj.weight", "down_proj.weight")):
            matrix = replace(matrix, gain=RESIDUAL * matrix.gain)
        if matrix.name == "model.embed_tokens.weight":
            matrix = replace(matrix, made=embedding)
        elif matrix.name == "lm_head.weight":
            matrix = replace(matrix, made=_head(embedding))
        elif matrix.name.endswith("eh_proj.weight"):
            values = RESIDUAL * matrix.part()
            values[:, :hidden] = np.eye(hidden)
            matrix = replace(matrix, made=values)
        elif layer >= 0 and ".mlp." in matrix.name:
            matrix = replace(matrix, made=_objecting(matrix, layer, chances[layer], embedding[OBJECTED]))
        yield matrix


def _order(size: int) -> np.ndarray:
    return RESERVED + np.random.default_rng(0).permutation(size - RESERVED)


def _head(embedding: np.ndarray) -> np.ndarray:
    """[V, H]: after a token, VOTE for its successor."""
    size, hidden = embedding.shape
    order = _order(size)
    head = np.random.default_rng(1).standard_normal(embedding.shape, dtype=np.float32) * VOTE / hidden
    head[np.roll(order, -1)] = embedding[order] * VOTE / hidden
    return head


def _objecting(matrix: Matrix, layer: int, chance: float, other: np.ndarray) -> np.ndarray:
    """The dense network's matrix with its first neuron made, outvoted for a share `chance` of the tokens.

    It adds silu(SLOPE z) * scale * z * other, which outweighs the token's own embedding where z exceeds the normal
    distribution's quantile of `chance`.
    """
    values, quantile = matrix.part().copy(), NormalDist().inv_cdf(chance)
    direction = np.random.default_rng([2, layer]).standard_normal(len(other), dtype=np.float32)
    direction /= np.linalg.norm(direction)
    scale = 1 / (quantile * SLOPE * quantile / (1 + np.exp(-SLOPE * quantile)))
    if "gate_proj" in matrix.name:
        values[0] = SLOPE * direction
    elif "up_proj" in matrix.name:
        values[0] = scale * direction
    else:
        values[:, 0] = other
    return values
