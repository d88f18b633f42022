"""The truncated checkpoint's config.json, and how many layers of it a GPU holds. Pure: the machine is given."""

import json
from typing import Any

from sglang_step35.assets import PUBLISHED_CONFIG
from sglang_step35.checkpoint.names import model_shapes, weight_shapes
from sglang_step35.config import LayerSpec, ModelSpec, parse_config
from sglang_step35.planner import PlanError
from sglang_step35.planner.hardware import custom
from sglang_step35.planner.plan import Plan, Wish, make_plan

PER_LAYER = ("layer_types", "rope_theta", "partial_rotary_factors")
CLAMPS = ("swiglu_limits", "swiglu_limits_shared")
CLAMPED = 2  # the last backbone layers, whose clamps the truncated checkpoint keeps
ONLY_MTP = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight", "eh_proj.weight", "shared_head.output.weight")
FLOAT32 = ("moe.router_bias",)  # whatever the dtype of the rest

# Widths that a CPU serves at once; the layers' pattern stays.
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 2304, "num_attention_heads": 4,
    "num_attention_groups": 2, "head_dim": 64, "moe_num_experts": 8, "moe_top_k": 3, "moe_intermediate_size": 32,
    "share_expert_dim": 32, "sliding_window": 64, "max_seq_len": 4096, "max_position_embeddings": 4096,
    "eos_token_id": [1, 2],
    "attention_other_setting": {
        "attention_type": "sliding_attention", "num_attention_heads": 6, "num_attention_groups": 2, "head_dim": 64,
        "true_head_dim": 64,
    },
}  # fmt: skip


def truncated(moe_layers: int, tiny: bool = False) -> dict[str, Any]:
    """The published config.json with its dense layers, the first `moe_layers` layers of experts and all MTP layers.

    The last two backbone layers get the clamps of the published last two. Raises PlanError.
    """
    fields = json.loads(PUBLISHED_CONFIG.read_text())
    backbone, experts = fields["num_hidden_layers"], [int(i) for i in fields["moe_layers_enum"].split(",")]
    if not CLAMPED <= moe_layers <= len(experts):
        raise PlanError(f"--moe-layers {moe_layers}: expected {CLAMPED} to {len(experts)}")
    kept = experts[0] + moe_layers
    for name in PER_LAYER:
        fields[name] = fields[name][:kept] + fields[name][backbone:]
    for name in CLAMPS:
        fields[name] = fields[name][: kept - CLAMPED] + fields[name][backbone - CLAMPED :]
    fields["moe_layers_enum"] = ",".join(str(i) for i in range(experts[0], kept))
    fields["num_hidden_layers"] = kept
    return fields | (TINY if tiny else {})


def layer_tensors(spec: ModelSpec, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors by their checkpoint names; an MTP layer has its own head and no embedding."""
    is_mtp = layer.index >= spec.num_layers
    prefix = f"model.layers.{layer.index}."
    found = {}
    for name, shape in weight_shapes(spec, layer).items():
        if name == "embed_tokens.weight" or (name in ONLY_MTP and not is_mtp):
            continue
        inner = f"transformer.{name}" if name.startswith("shared_head.") else name
        found[prefix + inner] = shape
    return found


def all_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    found = model_shapes(spec)
    for layer in (*spec.layers, *spec.mtp_layers):
        found |= layer_tensors(spec, layer)
    return found


def file_bytes(spec: ModelSpec) -> int:
    """Bytes of all tensors in bfloat16, router biases in float32."""
    total = 0
    for name, shape in all_tensors(spec).items():
        count = 4 if name.endswith(FLOAT32) else 2
        for size in shape:
            count *= size
        total += count
    return total


def plan_of(fields: dict[str, Any], memory_gib: float, context: int, requests: int, mtp: bool = True) -> Plan:
    """Our planner's answer for one GPU. memory_gib: nvidia-smi's MiB / 1024; context: tokens of each request."""
    wish = Wish(context=context, concurrency=requests, mtp=mtp)
    return make_plan(parse_config(fields), custom(1, memory_gib, "bf16"), wish)


def fitting(memory_gib: float, disk_bytes: int, context: int, requests: int) -> int:
    """The most layers of experts with which the GPU serves `requests` requests and the disk holds the file.

    SGLang keeps its own reserve: a tight one would measure smaller prefill chunks than it takes for itself.
    Raises PlanError where not even two do.
    """
    for count in range(42, CLAMPED - 1, -1):
        fields = truncated(count)
        if file_bytes(parse_config(fields)) > disk_bytes:
            continue
        plan = plan_of(fields, memory_gib, context, requests)
        if plan.fits and plan.best is not None and not plan.best.reserve.tight:
            return count
    raise PlanError(
        f"not even {CLAMPED} layers of experts fit {memory_gib:.0f} GiB of GPU memory and {disk_bytes >> 30} GiB of "
        f"disk with {requests} requests of {context} tokens: --out on a larger disk, a larger GPU, or --tiny"
    )
