"""What a checkpoint's `quantization_config` says about its packed tensors. No SGLang here.

Which modules are packed is read from the tensors themselves: one that an ignore list leaves out comes as an ordinary
tensor, and so do MTP layers that the config does not mention. The config says what the tensors cannot.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PLAIN_BITS = 16  # what AutoRound calls a layer that it leaves alone
MXFP4_GROUP = 32
WHOLE_ROW = -1


class QuantizationError(ValueError):
    """A `quantization_config` that cannot be served; the message names the field."""


@dataclass(frozen=True)
class Quantization:
    """schemes: every (bits, columns that share a scale) the config asks for somewhere; WHOLE_ROW for a scale a row.

    asymmetric: whether compressed-tensors' matrices come with zero points. zero_shift: see `packed.words.from_gptq`.
    block: rows and columns that share a scale in FP8.
    """

    method: str
    schemes: frozenset[tuple[int, int]] = frozenset()
    asymmetric: bool = False
    zero_shift: int = 1
    block: tuple[int, int] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Quantization":
        """Raises QuantizationError for a method, width or option that is not implemented."""
        method = config.get("quant_method")
        read = _READERS.get(str(method))
        if read is None:
            raise _refuse("quant_method", method, f"one of {', '.join(_READERS)}")
        return read(config)


def _fp8(config: Mapping[str, Any]) -> Quantization:
    _require(config, "fmt", ("e4m3", None))
    _require(config, "activation_scheme", ("dynamic", None))
    block = config.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise _refuse("weight_block_size", block, "two sizes, as StepFun publishes: [128, 128]")
    return Quantization("fp8", block=(int(block[0]), int(block[1])))


def _auto_round(config: Mapping[str, Any]) -> Quantization:
    _require(config, "packing_format", ("auto_round:auto_gptq", "auto_round:auto_awq", None))
    _require(config, "data_type", ("int", None))
    return _integers("auto-round", config, (config.get("extra_config") or {}).values())


def _gptq(config: Mapping[str, Any]) -> Quantization:
    if config.get("desc_act"):
        raise _refuse("desc_act", True, "false: act-order is not implemented on this platform")
    form = config.get("checkpoint_format") or "gptq"
    _require({"checkpoint_format": form}, "checkpoint_format", ("gptq", "gptq_v2"))
    return _integers("gptq", config, (config.get("dynamic") or {}).values(), zero_shift=int(form == "gptq"))


def _awq(config: Mapping[str, Any]) -> Quantization:
    version = str(config.get("version") or "gemm").lower()
    if version != "gemm":
        raise _refuse("version", version, "gemm")
    _require(config, "bits", (4,))
    return _integers("awq", config, ())


def _integers(method: str, config: Mapping[str, Any], special: Iterable[Mapping], zero_shift: int = 1) -> Quantization:
    """special: what single layers have instead, by the same fields."""
    schemes = set()
    for fields in (config, *({**config, **layer} for layer in special)):
        bits, group = fields.get("bits"), fields.get("group_size")
        if bits is not None and bits >= PLAIN_BITS:
            continue
        if bits not in (4, 8):
            raise _refuse("bits", bits, "4 or 8")
        schemes.add((bits, _group(group)))
    return Quantization(method, frozenset(schemes), zero_shift=zero_shift)


def _compressed_tensors(config: Mapping[str, Any]) -> Quantization:
    schemes: set[tuple[int, int]] = set()
    asymmetric = set()
    for name, group in (config.get("config_groups") or {}).items():
        field, weights = f"config_groups.{name}", group.get("weights") or {}
        form = group.get("format") or config.get("format")
        if form not in ("pack-quantized", "int-quantized", "mxfp4-pack-quantized"):
            raise _refuse(f"{field}.format", form, "pack-quantized, int-quantized or mxfp4-pack-quantized")
        if weights.get("actorder") not in (None, False, "weight", "static"):
            raise _refuse(f"{field}.weights.actorder", weights["actorder"], 'null or "weight", not act-order')
        _check_activations(f"{field}.input_activations", group.get("input_activations"))
        if form.startswith("mxfp4"):
            schemes.add((4, MXFP4_GROUP))
            continue
        bits, strategy = weights.get("num_bits") or 0, weights.get("strategy")
        if bits not in ((4, 8) if form == "pack-quantized" else (8,)):
            raise _refuse(f"{field}.weights.num_bits", bits, "4 or 8, 8 if the format is int-quantized")
        if strategy not in ("group", "channel"):
            raise _refuse(f"{field}.weights.strategy", strategy, "group or channel")
        schemes.add((bits, _group(weights.get("group_size") if strategy == "group" else None)))
        asymmetric.add(not weights.get("symmetric", True))
    if not schemes:
        raise _refuse("config_groups", config.get("config_groups"), "at least one group with weights")
    if len(asymmetric) > 1:
        raise _refuse("config_groups", "symmetric and asymmetric weights", "one of them")
    return Quantization("compressed-tensors", frozenset(schemes), asymmetric=any(asymmetric))


def _check_activations(field: str, activations: Mapping[str, Any] | None) -> None:
    """Activations are not quantised here: right for dynamic scales, whose rounding only costs accuracy."""
    if activations and not activations.get("dynamic"):
        raise _refuse(f"{field}.dynamic", activations.get("dynamic"), "true, not static activation scales")


def _mxfp4(config: Mapping[str, Any]) -> Quantization:
    return Quantization("mxfp4", frozenset({(4, MXFP4_GROUP)}))


_READERS = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "auto-round": _auto_round,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
}
METHODS = tuple(_READERS)  # values of `quant_method`


def _group(size: int | None) -> int:
    return WHOLE_ROW if size is None or size <= 0 else size


def _require(config: Mapping[str, Any], field: str, allowed: tuple) -> None:
    value = config.get(field)
    if value not in allowed:
        raise _refuse(field, value, " or ".join(str(entry) for entry in allowed if entry is not None))


def _refuse(field: str, value: Any, wanted: str) -> QuantizationError:
    return QuantizationError(
        f"quantization_config.{field} in config.json is {value!r}; this platform serves {wanted}: use a checkpoint "
        f"quantised so, or a machine on which SGLang has kernels for it"
    )
