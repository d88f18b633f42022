"""Wrong, incomplete and damaged checkpoints stop the load with a message that says what to do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_step35.assets import PUBLISHED_CONFIG
from sglang_step35.checkpoint.base import DamagedFile
from sglang_step35.checkpoint.names import TensorName, parse_name, weight_shapes
from sglang_step35.checkpoint.safetensors import SafetensorsFiles, read_header
from sglang_step35.config import parse_config
from sglang_step35.hicache import identity
from sglang_step35.model.weights import WeightError
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint

EXPERTS = "model.layers.4.moe.gate_proj.weight"
MTP = (["9"], ["10"], ["11"])


@pytest.fixture
def directory(tmp_path):
    return make_checkpoint(tmp_path, CheckpointShape())


@pytest.fixture
def sharded(tmp_path):
    return make_checkpoint(tmp_path, CheckpointShape(shards=3))


def edit(directory, change) -> None:
    """Apply `change` to the weights of a one-file checkpoint."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file({name: w.contiguous() for name, w in weights.items()}, file, metadata={"format": "pt"})


def failure(directory, draft: bool = False) -> str:
    with pytest.raises(WeightError) as error:
        model_host.load(directory, draft=draft)
    return str(error.value)


# Missing.


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.4.moe.router_bias",
        "model.layers.4.self_attn.q_norm.weight",
        "model.layers.4.share_expert.gate_proj.weight",
        EXPERTS,
    ],
)
def test_missing_tensor(directory, name):
    edit(directory, lambda weights: weights.pop(name))
    message = failure(directory)
    assert f"lacks {name}. Download" in message and str(directory) in message


def test_many_missing_tensors_are_counted(directory):
    edit(directory, lambda weights: [weights.pop(n) for n in list(weights) if "layers.5." in n])
    assert "model.layers.5.input_layernorm.weight" in failure(directory)
    assert "and 12 more" in failure(directory)


def test_missing_file_of_the_index(sharded):
    name = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"][EXPERTS]
    (sharded / name).unlink()
    message = failure(sharded)
    assert name in message and "is missing" in message


def test_missing_mtp_layers_stop_only_the_draft(directory):
    edit(directory, lambda weights: [weights.pop(n) for n in list(weights) if "layers.10." in n])
    model_host.load(directory)
    assert "model.layers.10.enorm.weight" in failure(directory, draft=True)


def test_a_checkpoint_whose_mtp_layers_were_dropped(directory):
    """Many 4-bit checkpoints of others: they serve, but cannot draft."""
    edit(directory, lambda weights: [weights.pop(n) for n in list(weights) if n.split(".")[2:3] in MTP])
    model_host.load(directory)
    message = failure(directory, draft=True)
    assert f"{directory} has no MTP layers (model.layers.9 and on)" in message
    assert "Remove --speculative-algorithm" in message


def test_missing_mtp_projection(directory):
    edit(directory, lambda weights: weights.pop("model.layers.9.eh_proj.weight"))
    assert "model.layers.9.eh_proj.weight" in failure(directory, draft=True)


# Unknown, twice, wrong.


def test_unknown_tensor(directory):
    edit(directory, lambda weights: weights.update({"model.layers.4.moe.bias": torch.zeros(1)}))
    message = failure(directory)
    assert "model.layers.4.moe.bias (in model.safetensors) belongs to nothing" in message


def test_unknown_tensor_outside_the_layers(directory):
    edit(directory, lambda weights: weights.update({"vision.proj.weight": torch.zeros(1)}))
    assert "vision.proj.weight (in model.safetensors) belongs to nothing" in failure(directory)


def test_dense_weights_for_a_layer_with_experts(directory):
    edit(directory, lambda weights: weights.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(96, 64)}))
    assert "model.layers.4.mlp.up_proj.weight" in failure(directory)


def test_tensor_in_two_files(directory):
    weights = load_file(directory / "model.safetensors")
    save_file({EXPERTS: weights[EXPERTS]}, directory / "old.safetensors")
    message = failure(directory)
    assert f"{EXPERTS} (in model.safetensors and old.safetensors) occurs twice" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.g_proj.weight",
        "model.layers.4.moe.gate.weight",
        "model.layers.4.share_expert.down_proj.weight",
        EXPERTS,
    ],
)
def test_wrong_shape(directory, name):
    edit(directory, lambda weights: weights.update({name: weights[name][:-1]}))
    message = failure(directory)
    assert f"{name} (in model.safetensors) has shape" in message and "config.json asks for" in message


def test_a_shape_that_would_broadcast(directory):
    edit(directory, lambda weights: weights.update({"model.norm.weight": torch.zeros(1)}))
    assert "has shape (1,), config.json asks for (64,)" in failure(directory)


def test_wrong_shape_of_a_head_copy(directory):
    name = "model.layers.9.transformer.shared_head.output.weight"
    edit(directory, lambda weights: weights.update({name: weights[name][:10]}))
    assert f"{name} (in model.safetensors) has shape (10, 64)" in failure(directory, draft=True)


def test_quantised_weights_without_their_config(directory):
    name = "model.layers.4.self_attn.q_proj.weight"
    edit(directory, lambda weights: weights.update({name: weights[name].to(torch.float8_e4m3fn)}))
    message = failure(directory)
    assert "float8_e4m3fn" in message and "quantization_config" in message


# Damaged files.


@pytest.mark.parametrize("cut", [1, 1000, 10**9])
def test_truncated_file(sharded, cut):
    file = sharded / "model-00002-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: max(4, len(data) - cut)])
    message = failure(sharded)
    assert f"{file} is truncated" in message and "again" in message
    assert "model-00001" not in message


def test_garbage_in_the_header(sharded):
    file = sharded / "model-00002-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\0" * 32
    file.write_bytes(bytes(data))
    assert f"{file} has no readable safetensors header" in failure(sharded)


def test_headers_name_shapes_and_files(sharded):
    files = SafetensorsFiles(str(sharded))
    (name,) = files.holding(EXPERTS)
    assert read_header(sharded / name)[EXPERTS]["shape"] == [8, 32, 64]
    assert files.describe(EXPERTS) == f"{EXPERTS} (in {name})"
    assert files.dtype(EXPERTS) == "F32" and files.dtype("nothing") is None
    assert not files.damaged()
    with pytest.raises(DamagedFile, match="too long"):
        (sharded / name).write_bytes((sharded / name).read_bytes() + b"\0")
        read_header(sharded / name)


def test_files_of_an_unknown_model():
    assert SafetensorsFiles("nobody/nothing").damaged() == []
    assert SafetensorsFiles(None).describe("x") == "x"


# What is passed over, and later loads.


def test_each_model_passes_over_the_other(directory):
    backbone, mtp = model_host.load(directory), model_host.load(directory, draft=True)
    assert backbone.weights_loaded and mtp.weights_loaded


def test_a_weight_update_may_be_partial(directory, monkeypatch):
    monkeypatch.setattr(identity, "_updates", 0)
    model = model_host.load(directory)
    assert not identity.weight_updates()
    model.load_weights([("model.norm.weight", torch.full((64,), 0.5))])
    assert torch.equal(model.model.norm.scale, torch.full((64,), 1.5) * 8)
    assert identity.weight_updates()  # KV in files is no longer this model's
    with pytest.raises(WeightError, match="belongs to nothing"):
        model.load_weights([("model.nrom.weight", torch.zeros(64))])


def test_a_weight_update_reaches_the_query_norm(directory):
    model, ids = model_host.load(directory), [5, 6, 7]
    before = model_host.all_logits(model, ids)
    model.load_weights([("model.layers.0.self_attn.q_norm.weight", torch.randn(16))])
    assert not torch.allclose(model_host.all_logits(model, ids), before)


def test_experts_one_by_one(directory):
    """Some quantisers store each expert by itself."""
    before = model_host.load(directory)

    def split(weights):
        for name in [n for n in weights if ".moe." in n and "_proj." in n]:
            prefix, _, rest = name.partition(".moe.")
            for expert, weight in enumerate(weights.pop(name)):
                weights[f"{prefix}.moe.experts.{expert}.{rest}"] = weight

    edit(directory, split)
    after = model_host.load(directory)
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)
    edit(directory, lambda weights: weights.pop("model.layers.4.moe.experts.3.up_proj.weight"))
    assert "model.layers.4.moe.up_proj.weight of experts 3" in failure(directory)


# Names and shapes.


def test_names():
    assert parse_name("lm_head.weight") == TensorName(None, "lm_head", "weight")
    assert parse_name("model.layers.7.moe.router_bias") == TensorName(7, "moe", "router_bias")
    assert parse_name("model.layers.45.transformer.shared_head.norm.weight") == TensorName(
        45, "shared_head.norm", "weight"
    )
    assert parse_name("model.layers.3.moe.experts.12.up_proj.weight_scale") == TensorName(
        3, "moe.up_proj", "weight_scale", 12
    )


def test_published_shapes():
    spec = parse_config(json.loads(PUBLISHED_CONFIG.read_text()))
    full, sliding = weight_shapes(spec, spec.layers[0]), weight_shapes(spec, spec.layers[5])
    assert full["self_attn.q_proj.weight"] == (8192, 4096)
    assert sliding["self_attn.q_proj.weight"] == (12288, 4096)
    assert sliding["moe.down_proj.weight"] == (288, 4096, 1280)
    assert weight_shapes(spec, spec.mtp_layers[2])["eh_proj.weight"] == (4096, 8192)
