"""Quantised safetensors that do not fit together stop the load, naming tensor and file."""

import json
import re

import pytest
import torch

from sglang_step35.checkpoint.quantization import QuantizationError
from tests.model.test_weights import edit, failure
from tests.packed.test_model import SMALL
from tests.support import model_host, quantised
from tests.support.checkpoints import make_checkpoint

MODULE = "model.layers.3.self_attn.o_proj"  # [64, 96]
EXPERT = "model.layers.4.moe.experts.2.up_proj"
FILE = r"\(in model\.safetensors\)"
GROUPED, OTHERS = quantised.schemes(32), quantised.other_schemes()


@pytest.fixture
def write(tmp_path):
    """Writes a quantised checkpoint whose weights `change` has edited."""

    def make(scheme, change=lambda weights: None, **config):
        make_checkpoint(tmp_path, SMALL)
        quantised.write(tmp_path, scheme)
        edit(tmp_path, change)
        fields = json.loads((tmp_path / "config.json").read_text())
        fields["quantization_config"] |= config
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return tmp_path

    return make


def cut(name: str):
    def change(weights):
        weights[name] = weights[name][..., :1]

    return change


@pytest.mark.parametrize(
    ("scheme", "leaf", "wanted"),
    [
        (GROUPED["AWQ"], "qzeros", r"\(3, 8\)"),
        (GROUPED["compressed-tensors, asymmetric"], "weight_zero_point", r"\(8, 3\)"),
        (OTHERS["FP8"], "weight_scale_inv", r"\(2, 3\)"),
    ],
)
def test_parts_of_the_wrong_shape(write, scheme, leaf, wanted):
    error = failure(write(scheme, cut(f"{MODULE}.{leaf}")))
    assert re.search(rf"o_proj\.{leaf} {FILE} has shape .*, the other parts of its matrix ask for {wanted}", error)


def test_zero_points_of_another_width(write):
    error = failure(write(GROUPED["GPTQ"], cut(f"{MODULE}.qzeros")))
    assert f"{MODULE}.qzeros (in model.safetensors) has shape (3, 1), which holds no zero points" in error


@pytest.mark.parametrize(
    ("scheme", "leaf"),
    [
        (GROUPED["AutoRound"], "scales"),
        (GROUPED["AWQ"], "qweight"),
        (GROUPED["compressed-tensors"], "weight_scale"),
        (GROUPED["compressed-tensors"], "weight_shape"),
        (GROUPED["compressed-tensors, asymmetric"], "weight_zero_point"),
        (OTHERS["FP8"], "weight_scale_inv"),
        (OTHERS["W8A8"], "weight_scale"),
    ],
)
@pytest.mark.parametrize("module", [MODULE, EXPERT])
def test_a_missing_part(write, scheme, leaf, module):
    if scheme.stacked:
        module = module.replace("experts.2.", "")
    directory = write(scheme, lambda weights: weights.pop(f"{module}.{leaf}"))
    error = failure(directory)
    assert f"{module}." in error and f"(in model.safetensors) without its {leaf}" in error


def test_a_missing_part_of_mxfp4_blocks(write):
    name = "model.layers.4.moe.up_proj"
    error = failure(write(OTHERS["MXFP4 blocks"], lambda weights: weights.pop(f"{name}_scales")))
    assert f"{name}_blocks (in model.safetensors) without its _scales" in error


def test_a_scale_without_a_packed_weight(write):
    def change(weights):
        weights[f"{MODULE}.weight"] = torch.zeros(64, 96)
        del weights[f"{MODULE}.weight_packed"], weights[f"{MODULE}.weight_shape"]

    assert f"{MODULE}.weight_scale (in model.safetensors) without its weight_packed" in failure(
        write(GROUPED["compressed-tensors"], change)
    )


def test_groups_that_do_not_divide(write):
    """96 columns in 5 groups."""

    def change(weights):
        for leaf in ("scales", "qzeros"):
            weights[f"{MODULE}.{leaf}"] = torch.cat([weights[f"{MODULE}.{leaf}"]] * 2)[:5]

    error = failure(write(GROUPED["GPTQ"], change))
    assert f"{MODULE}.scales (in model.safetensors) has 5 groups for 96 columns" in error


def test_groups_of_another_width_than_declared(write):
    error = failure(write(GROUPED["AWQ"], group_size=64))
    assert "means groups of 32 columns of 4 bits" in error and "asks for 64 columns of 4 bits" in error
    assert ".scales (in model.safetensors) means" in error


def test_two_copies(write):
    """A second file with the same parts."""
    directory = write(GROUPED["compressed-tensors"])
    (directory / "extra.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    error = failure(directory)
    assert "occurs twice" in error and "extra.safetensors and model.safetensors" in error


def test_a_packed_and_a_plain_copy(write):
    def change(weights):
        weights[f"{MODULE}.weight"] = torch.zeros(64, 96)

    assert f"{MODULE}.weight (in model.safetensors) occurs twice" in failure(write(GROUPED["AWQ"], change))


def test_act_order_is_refused(write):
    def change(weights):
        weights[f"{MODULE}.g_idx"] = weights[f"{MODULE}.g_idx"].flip(0)

    error = failure(write(GROUPED["GPTQ"], change))
    assert f"{MODULE}.g_idx (in model.safetensors) orders the columns by activation" in error


def test_a_matrix_of_another_width(write):
    """Parts that fit each other and not the model."""

    def change(weights):
        weights[f"{MODULE}.qweight"] = weights[f"{MODULE}.qweight"][:, :32]
        weights[f"{MODULE}.scales"] = weights[f"{MODULE}.scales"][:, :32]
        weights[f"{MODULE}.qzeros"] = weights[f"{MODULE}.qzeros"][:, :4]

    error = failure(write(GROUPED["GPTQ"], change))
    assert "o_proj.scales (in model.safetensors) completes a matrix of shape (32, 96), config.json asks for" in error


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("GPTQ", dict(bits=3), "bits in config.json is 3; this platform serves 4 or 8"),
        ("GPTQ", dict(desc_act=True), "desc_act in config.json is True"),
        ("AWQ", dict(version="gemv"), "version in config.json is 'gemv'"),
        ("AutoRound", dict(packing_format="auto_round:llm_compressor"), "packing_format in config.json"),
    ],
)
def test_options_that_are_not_implemented(write, name, change, field):
    with pytest.raises(QuantizationError, match=field):
        model_host.load(write(GROUPED[name], **change))
