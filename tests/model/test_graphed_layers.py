"""Decoder layers by ggml's graphs against transformers: float32 weights are multiplied exactly, packed ones within what
8-bit activations cost."""

import json
from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType as Q

from sglang_step35.model import graphed_layers
from sglang_step35.packed import ik_check, ik_rows
from tests.packed.test_model import K_WIDE, SMALL, converted, k_mix
from tests.support import model_host, quantised
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.reference import Reference, load_reference

TOLERANCE = 1e-4
ROUNDED = 0.03  # relative error of hidden states behind nine layers; 0.005 to 0.023 seen, in plain torch up to 0.026

pytestmark = pytest.mark.skipif(not ik_check.usable(), reason="the library is not usable here")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("graphed"), CheckpointShape())


@pytest.fixture
def backbone(directory):
    model = model_host.load(directory)
    by_graphs(model.model.graphed)
    return model


def by_graphs(layers: graphed_layers.GraphedLayers) -> None:
    """Always: float32 activations, too."""
    layers.forward = layers.by_graphs


def prompt(length: int) -> list[int]:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(length)).tolist()


# The window is 8 keys.
@pytest.mark.parametrize(("length", "threads"), [(1, 1), (7, 1), (8, 1), (9, 2), (33, 1), (64, 1)])
def test_logits(directory, backbone, length, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = model_host.all_logits(backbone, prompt(length))
    finally:
        torch.set_num_threads(before)
    assert (found - load_reference(directory).logits(prompt(length))).abs().max() < TOLERANCE


def test_mtp_logits(directory, backbone):
    mtp = model_host.load(directory, draft=True)
    mtp.share_with(backbone)
    for layer in mtp.layers:
        by_graphs(layer.graphed)
    reference, ids = load_reference(directory), prompt(40)
    found = model_host.mtp_logits(mtp, reference.hidden_before_norm(ids), ids)
    for logits, expected in zip(found, reference.mtp_logits(ids), strict=True):
        assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        dict(limits=False),
        dict(num_layers=1),
        dict(dense_layers=9),
        dict(kv_groups=1, sliding_kv_groups=3),
        dict(top_k=8),
    ],
    ids=str,
)
def test_shapes(tmp_path, change):
    directory = make_checkpoint(tmp_path, replace(CheckpointShape(), **change))
    model = model_host.load(directory)
    by_graphs(model.model.graphed)
    ids = prompt(20)
    assert (model_host.all_logits(model, ids) - load_reference(directory).logits(ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "K-quants"])
def test_packed_weights(tmp_path, kind):
    shape, quantise = (K_WIDE, k_mix) if kind == "K-quants" else (SMALL, lambda name: Q[kind])
    file, reference = converted(tmp_path, replace(shape, residual=0.1), quantise)
    model = model_host.load_gguf(file, dtype="bfloat16")
    assert model.model.graphed._faster(torch.zeros(24, 1, dtype=torch.bfloat16))
    check_hidden(model, reference, 24)


@pytest.mark.parametrize("length", [7, 40])
def test_bfloat16_weights(tmp_path, monkeypatch, length):
    """By `ik_rows.py`, whatever the size of a matrix."""
    monkeypatch.setattr(ik_rows, "LARGE", 0)
    steps = recorded_steps(monkeypatch, "_by_bfloat16")
    file, reference = converted(tmp_path, replace(SMALL, residual=0.1), lambda name: Q.BF16)
    check_hidden(model_host.load_gguf(file, dtype="bfloat16"), reference, length)
    assert len(steps) > 7 * SMALL.num_layers


@pytest.mark.parametrize("length", [7, 40])
def test_fp8_weights(tmp_path, monkeypatch, length):
    """Read where the file has them."""
    steps = recorded_steps(monkeypatch, "_by_float8")
    directory = make_checkpoint(tmp_path, replace(SMALL, residual=0.1))
    meaning = quantised.write(directory, quantised.fp8((32, 32)))
    reference = Reference(json.loads((directory / "config.json").read_text()), meaning)
    check_hidden(model_host.load(directory, dtype="bfloat16"), reference, length)
    assert len(steps) > 2 * SMALL.num_layers


def recorded_steps(monkeypatch, name: str) -> list:
    """Operands of the steps that this function of `ik_rows` makes from now on."""
    steps, step = [], getattr(ik_rows, name)
    monkeypatch.setattr(ik_rows, name, lambda *operands, **limit: steps.append(operands) or step(*operands, **limit))
    return steps


def check_hidden(model, reference, length: int) -> None:
    expected = reference.hidden_before_norm(prompt(length))
    found = model_host.run(model, prompt(length)).hidden_states.float()
    assert (found - expected).norm() < ROUNDED * expected.norm()
