"""Which SGLang method runs 4-bit routed experts: one whose kernels clamp after silu.

For GPTQ, AWQ and AutoRound checkpoints SGLang 0.5.23 takes Marlin whatever `--moe-runner-backend` names, and Marlin
drops Step-3.5's SwiGLU clamp (layers/quantization/auto_round.py, gptq/gptq.py, awq/awq.py). `MoeWNA16Method` reads the
same tensors and runs on the Triton kernels. compressed-tensors asks for the flag itself and needs none of this.
"""

from sglang.srt.layers.moe import get_moe_runner_backend
from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Config, MoeWNA16Method

NAMES = ("gptq_marlin", "awq", "awq_marlin", "auto-round")  # `QuantizationConfig.get_name`
UNQUANTISED_BITS = 16
MARLIN_COLUMNS = 128  # input columns of a rank that SGLang's 4-bit linear layers need a multiple of


class _FusedMoEPlace:
    """A layer of experts that is not built yet, for AutoRound's per-layer lookup, which asks its class name."""


def triton_method(quant_config, prefix: str) -> MoeWNA16Method | None:
    """The method for the experts at `prefix`; None where SGLang's own choice by `quant_config` may stand.

    Raises ValueError for packings that only Marlin reads.
    """
    backend = get_moe_runner_backend()
    if quant_config is None or quant_config.get_name() not in NAMES or not (backend.is_auto() or backend.is_triton()):
        return None
    packing = _packing(quant_config, prefix)
    if packing is None:
        return None
    if getattr(quant_config, "desc_act", False) or packing["group_size"] <= 0:
        raise ValueError(
            f"{prefix} is quantised with act-order (desc_act) or without groups, which only SGLang's Marlin kernels "
            f"read, and those drop this model's SwiGLU clamp: use a checkpoint with desc_act false and a group_size"
        )
    return MoeWNA16Method(MoeWNA16Config.from_config(packing))


def _packing(quant_config, prefix: str) -> dict | None:
    """How these experts are packed, as `MoeWNA16Config.from_config` reads it; None if they are not quantised."""
    name = quant_config.get_name()
    if name == "gptq_marlin":
        return _gptq(quant_config.weight_bits, quant_config.group_size, quant_config.is_sym)
    if name != "auto-round":
        if any(skipped in prefix for skipped in quant_config.modules_to_not_convert):
            return None
        return _awq(quant_config.weight_bits, quant_config.group_size, quant_config.zero_point)
    bits, group_size, symmetric = quant_config.get_layer_config(_FusedMoEPlace(), prefix)
    if bits >= UNQUANTISED_BITS:
        return None
    if "gptq" in quant_config.packing_format or "gptq" in quant_config.backend:
        return _gptq(bits, group_size, symmetric)
    return _awq(bits, group_size, not symmetric)


def _gptq(bits: int, group_size: int, symmetric: bool) -> dict:
    return dict(quant_method="gptq", bits=bits, group_size=group_size, sym=symmetric)


def _awq(bits: int, group_size: int, zero_point: bool) -> dict:
    return dict(quant_method="awq", bits=bits, group_size=group_size, zero_point=zero_point)
