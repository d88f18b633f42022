"""Decoder layers by ggml's graphs against transformers: float32 weights are multiplied exactly, packed ones within what
8-bit activations cost."""

import json
from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType as Q

from sglang_step35.model import graphed_layers, layer_steps, single_rank
from sglang_step35.model.weights import refresh
from sglang_step35.packed import amx_rows, ik_check, ik_library, ik_rows
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


@pytest.mark.skipif(not amx_rows.supported(), reason="the CPU has no AMX")
@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "FP8"])
def test_many_rows_by_amx(tmp_path, monkeypatch, kind):
    steps, step = [], amx_rows.step
    monkeypatch.setattr(amx_rows, "step", lambda *operands, **limit: steps.append(1) or step(*operands, **limit))
    shape = replace(SMALL, residual=0.1)
    if kind == "FP8":
        directory = make_checkpoint(tmp_path, shape)
        meaning = quantised.write(directory, quantised.fp8((32, 32)))
        reference = Reference(json.loads((directory / "config.json").read_text()), meaning)
        model = model_host.load(directory, dtype="bfloat16")
    else:
        file, reference = converted(tmp_path, shape, lambda name: Q[kind])
        model = model_host.load_gguf(file, dtype="bfloat16")
    check_hidden(model, reference, 40)
    assert len(steps) > 2 * SMALL.num_layers


def test_new_weights(directory, backbone):
    """Another checkpoint in the same memory, and in other memory."""
    other = make_checkpoint(directory.parent / "other", CheckpointShape(), seed=1)
    ids = prompt(9)
    model_host.all_logits(backbone, ids)
    fresh = dict(model_host.load(other).named_parameters())
    for name, parameter in backbone.named_parameters():
        if "norm" in name:
            parameter.data.copy_(fresh[name].data)
        else:
            parameter.data = fresh[name].data
    refresh(backbone)
    assert (model_host.all_logits(backbone, ids) - load_reference(other).logits(ids)).abs().max() < TOLERANCE


def test_a_full_arena(directory, backbone, monkeypatch):
    monkeypatch.setattr(ik_library, "ARENA_BYTES", 200_000)
    monkeypatch.setattr(ik_library, "library", lambda: ik_library.Library(ik_library.library_path()))
    library = ik_library.library()
    monkeypatch.setattr(ik_library, "library", lambda: library)
    for length in (9, 10, 11, 9):
        found = model_host.all_logits(backbone, prompt(length))
        assert (found - load_reference(directory).logits(prompt(length))).abs().max() < TOLERANCE


def test_what_lies_between_the_steps_must_fit(backbone, monkeypatch):
    monkeypatch.setattr(layer_steps, "bytes_between", lambda layer: 64)
    with pytest.raises(MemoryError, match="a graph needs"):
        model_host.all_logits(backbone, prompt(9))


@pytest.mark.parametrize(
    ("rows", "dtype", "graphs"),
    [*((rows, "bfloat16", 0 < rows <= 64) for rows in (0, 1, 64, 65)), (1, "float32", False)],
)
@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_when(monkeypatch, loaded, rows, dtype, kind, graphs):
    layers, ways = loaded[kind].model.graphed, []
    monkeypatch.setattr(layers, "by_graphs", lambda x, batch: ways.append(True), raising=False)
    monkeypatch.setattr(single_rank, "decoder_layers", lambda layers, x, batch: ways.append(False))
    layers(torch.zeros(rows, 64, dtype=getattr(torch, dtype)), None)
    assert ways == [graphs]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Models in bfloat16, by the type of their weights."""
    folder = tmp_path_factory.mktemp("kinds")
    return {
        kind: model_host.load_gguf(converted(folder / kind, SMALL, lambda name: Q[kind])[0], dtype="bfloat16")  # noqa: B023
        for kind in ("BF16", "Q8_0")
    }


def test_weights_that_the_library_does_not_read(backbone, monkeypatch):
    """One is enough: the layers then run in plain torch."""
    monkeypatch.setattr(layer_steps.ik_kernel, "reads", lambda part: part.shape[0] != 512)
    layers = graphed_layers.GraphedLayers(backbone.model.layers)
    assert layers._faster(torch.zeros(1, 64, dtype=torch.bfloat16))
    monkeypatch.setattr(layer_steps.ik_kernel, "reads", lambda part: False)
    layers.refresh()
    assert not layers._faster(torch.zeros(1, 64, dtype=torch.bfloat16))


def recorded_steps(monkeypatch, name: str) -> list:
    """Operands of the steps that this function of `ik_rows` makes from now on, without AMX."""
    monkeypatch.setattr(amx_rows, "supported", lambda: False)
    steps, step = [], getattr(ik_rows, name)
    monkeypatch.setattr(ik_rows, name, lambda *operands, **limit: steps.append(operands) or step(*operands, **limit))
    return steps


def check_hidden(model, reference, length: int) -> None:
    expected = reference.hidden_before_norm(prompt(length))
    found = model_host.run(model, prompt(length)).hidden_states.float()
    assert (found - expected).norm() < ROUNDED * expected.norm()
