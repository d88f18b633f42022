"""scripts.nano.quantised rounds as other libraries do, and scripts.split_experts changes the layout only."""

import json
import subprocess
import sys

import gguf
import pytest
import torch
from safetensors.torch import load_file

from scripts.nano.quantised import FORMATS, LINEAR, from_gguf
from scripts.split_experts import split
from sglang_step35.assets import NANO
from tests.support import model_host, quantised
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.gguf_files import write_gguf
from tests.support.reference import load_reference

ROUNDED = {form.name: form.rounded for form in FORMATS}


def matrix(rows: int = 96, columns: int = 320) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("INT4, groups of 32", quantised.compressed(4, 32)),
        ("INT8, a scale a row", quantised.compressed(8, None)),
        ("FP8, blocks of 128 x 128", quantised.fp8((128, 128))),
    ],
)
def test_rounding_is_the_libraries(name, scheme):
    _, meaning = scheme.pack(matrix())
    assert torch.allclose(ROUNDED[name](matrix()), meaning, atol=1e-6)


def test_the_last_group_is_what_is_left():
    weight = matrix(columns=160)
    rounded = ROUNDED["INT4, groups of 128"](weight)
    parts = [ROUNDED["INT4, groups of 32"](weight[:, 128:]), ROUNDED["INT4, groups of 128"](weight[:, :128])]
    assert torch.equal(rounded, torch.cat(parts[::-1], dim=1))


def test_what_each_format_rounds():
    stored = {name: weight.float() for name, weight in load_file(NANO / "model.safetensors").items()}
    changed = {
        form.name: {name for name, weight in form.weights(stored).items() if not torch.equal(weight, stored[name])}
        for form in FORMATS
    }
    linear = {name for name in stored if LINEAR.fullmatch(name)}
    assert changed["bf16"] == set()
    assert changed["FP8, blocks of 128 x 128"] == changed["INT4, groups of 32"] == linear
    tables = ("lm_head.weight", "model.embed_tokens.weight")
    assert changed["Q4_0"] - linear == {name for name in stored if name.endswith(("g_proj.weight", *tables))}
    assert not any(name.endswith(("moe.gate.weight", "norm.weight", "router_bias")) for name in changed["Q4_0"])


def test_weights_of_a_gguf_are_what_the_gguf_package_says(tmp_path):
    expected = write_gguf(NANO, tmp_path / "nano.gguf", lambda name: gguf.GGMLQuantizationType.Q4_0)
    found = from_gguf(tmp_path / "nano.gguf")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], torch.from_numpy(expected[name].copy()), atol=1e-6) for name in found)


def test_split_experts_open_as_the_stacked_ones(tmp_path):
    source = make_checkpoint(tmp_path / "source", CheckpointShape(shards=2))
    command = [sys.executable, "-m", "scripts.split_experts", str(source), str(tmp_path / "target")]
    subprocess.run(command, check=True, timeout=120)
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.4.moe.experts.7.down_proj.weight" in index
    assert not any(name.endswith("moe.down_proj.weight") for name in index)
    ids = list(range(3, 40))
    expected = load_reference(source).logits(ids)
    assert (model_host.all_logits(model_host.load(tmp_path / "target"), ids) - expected).abs().max() < 1e-4


def test_other_tensors_are_left_alone():
    weights = {"model.layers.4.moe.gate.weight": torch.ones(2, 3), "lm_head.weight": torch.ones(1)}
    assert split(weights) == weights
