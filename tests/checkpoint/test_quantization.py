"""What `quantization_config` may say: read as the tools write it, refused with the field's name otherwise."""

from typing import Any

import pytest

from sglang_step35.checkpoint.quantization import WHOLE_ROW, Quantization, QuantizationError
from tests.support import int4, quantised

FP8 = quantised.fp8((128, 128)).config
W8A8 = quantised.compressed(8, None, form="int-quantized", activations=True).config
INT4 = quantised.compressed(4, 32).config


def changed(config: dict, path: str, value: Any) -> dict:
    """The same config with the field at a dotted path changed."""
    head, _, rest = path.partition(".")
    return config | {head: changed(config[head], rest, value) if rest else value}


def test_schemes():
    assert Quantization.of(FP8).block == (128, 128)
    assert Quantization.of(INT4).schemes == {(4, 32)}
    assert Quantization.of(W8A8).schemes == {(8, WHOLE_ROW)}
    assert not Quantization.of(INT4).asymmetric
    assert Quantization.of(quantised.compressed(4, 128, symmetric=False).config).asymmetric


def test_layers_of_their_own_kind():
    """AutoRound's and GPTQ's lists of layers with other widths; 16 bits mean unquantised."""
    mixed = dict(extra_config={"a": dict(bits=8, group_size=128), "b": dict(bits=16), "c": dict(group_size=64)})
    assert Quantization.of(int4.formats(32)["AutoRound"].config | mixed).schemes == {(4, 32), (8, 128), (4, 64)}
    dynamic = dict(dynamic={r"+:.*\.down_proj": dict(bits=8), r"-:.*gate.*": {}})
    assert Quantization.of(int4.formats(32)["GPTQ"].config | dynamic).schemes == {(4, 32), (8, 32)}


def test_gptq_s_second_format_stores_zeros_as_they_are():
    config = int4.formats(32)["GPTQ"].config
    shifts = [Quantization.of(config | dict(checkpoint_format=form)).zero_shift for form in ("gptq", "gptq_v2")]
    assert (Quantization.of(config).zero_shift, *shifts) == (1, 1, 0)


@pytest.mark.parametrize(
    ("config", "path", "value", "message"),
    [
        (FP8, "quant_method", "nvfp4", "quant_method in config.json is 'nvfp4'; this platform serves one of fp8, comp"),
        (FP8, "weight_block_size", None, "weight_block_size in config.json is None"),
        (FP8, "activation_scheme", "static", "activation_scheme in config.json is 'static'"),
        (FP8, "fmt", "e5m2", "fmt in config.json is 'e5m2'"),
        (INT4, "format", "marlin-24", "config_groups.group_0.format in config.json is 'marlin-24'"),
        (INT4, "config_groups.group_0.weights.num_bits", 2, "weights.num_bits in config.json is 2"),
        (INT4, "config_groups.group_0.weights.strategy", "tensor", "weights.strategy in config.json is 'tensor'"),
        (INT4, "config_groups.group_0.weights.actorder", "group", "weights.actorder in config.json is 'group'"),
        (W8A8, "config_groups.group_0.input_activations.dynamic", False, "input_activations.dynamic in config.json"),
        (INT4, "config_groups", {}, "config_groups in config.json is {}; this platform serves at least one group"),
    ],
)
def test_refusals(config, path, value, message):
    with pytest.raises(QuantizationError, match=message):
        Quantization.of(changed(config, path, value))


def test_mixed_symmetry_is_refused():
    second = quantised.compressed(4, 32, symmetric=False).config["config_groups"]["group_0"]
    with pytest.raises(QuantizationError, match="symmetric and asymmetric weights"):
        Quantization.of(changed(INT4, "config_groups", {**INT4["config_groups"], "group_1": second}))
