"""Which tensor- and expert-parallel sizes a checkpoint can be cut into."""

from sglang_step35.config import ModelSpec
from sglang_step35.planner import PlanError
from sglang_step35.planner.weights import BLOCK

VOCAB_PADDING = 64  # SGLang pads the vocabulary to a multiple of this before cutting it


def check_tp(spec: ModelSpec, tp: int, devices: int) -> int:
    """tp itself. Raises PlanError when it exceeds the devices or cuts a head or a matrix."""
    if tp > devices:
        raise PlanError(f"--tp {tp}: more than the {devices} device(s) of the machine")
    layers = (*spec.layers, *spec.mtp_layers)
    wholes = {"query heads": {layer.attention.num_heads for layer in layers}}
    wholes["dense feed-forward channels"] = {layer.dense_size for layer in layers if layer.dense_size}
    wholes["shared expert channels"] = {layer.moe.shared_size for layer in layers if layer.moe}
    wholes["padded vocabulary entries"] = {-(-spec.vocab_size // VOCAB_PADDING) * VOCAB_PADDING}
    for what, sizes in wholes.items():
        for size in sizes:
            if size % tp:
                raise PlanError(f"--tp {tp}: does not divide the {size} {what}")
    for groups in {layer.attention.num_kv_heads for layer in layers}:
        if groups % tp and tp % groups:
            raise PlanError(f"--tp {tp}: neither divides the {groups} KV heads nor is a multiple of them")
    return tp


def choose_ep(spec: ModelSpec, quantization: str, tp: int, ep: int | None) -> int:
    """The expert-parallel size: the one asked for, else 1, or tp where tensor parallelism would cut a scale block.

    Raises PlanError when SGLang or the checkpoint cannot be cut that way.
    """
    experts = [layer.moe for layer in spec.layers if layer.moe]
    if not experts:
        return 1
    sizes, counts = {moe.expert_size for moe in experts}, {moe.num_experts for moe in experts}
    block = BLOCK if quantization in ("fp8", "int4") else 1
    cuts_block = tp > 1 and any(size % tp or size // tp % block for size in sizes)
    if ep is None:
        ep = tp if cuts_block else 1
    if ep not in (1, tp):
        raise PlanError(f"--ep {ep}: SGLang takes 1 or the tensor-parallel size, {tp}")
    if ep > 1 and any(count % ep for count in counts):
        raise PlanError(f"--ep {ep}: does not divide the {max(counts)} routed experts")
    if ep == 1 and cuts_block:
        raise PlanError(
            f"--ep 1: --tp {tp} cuts experts of width {max(sizes)} into {max(sizes) / tp:g} channels, "
            f"not whole {quantization} blocks of {block}; use --ep {tp}"
        )
    return ep
