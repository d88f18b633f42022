"""The backbone, loaded by SGLang's loader, against transformers in float32."""

import pytest
import torch

from sglang_step35.model.layer_steps import ROWS
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.reference import load_reference

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def model(directory):
    return model_host.load(directory)


@pytest.fixture(scope="module")
def reference(directory):
    return load_reference(directory)


@pytest.fixture(params=["plain", "sglang"])
def path(request, model):
    """Both ways through the layers: plain torch, and SGLang's wrappers."""
    before = model.model.runs_single_rank
    model.model.runs_single_rank = request.param == "plain"
    yield request.param
    model.model.runs_single_rank = before


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 60])  # the window is 8 keys
def test_logits(path, model, reference, length):
    ids = prompt(length)
    assert (model_host.all_logits(model, ids) - reference.logits(ids)).abs().max() < TOLERANCE


def test_hidden_states_are_those_before_the_norm(path, model, reference):
    ids = prompt(20, seed=1)
    out = model_host.run(model, ids)
    assert (out.hidden_states - reference.hidden_before_norm(ids)).abs().max() < TOLERANCE
    assert (out.next_token_logits[0] - reference.logits(ids)[-1]).abs().max() < TOLERANCE


def test_the_portable_platform_takes_the_plain_path(model):
    assert model.model.runs_single_rank


def test_radix_attention_gets_the_keys_before_the_query(model):
    windows = {layer.self_attn.attn.sliding_window_size for layer in model.model.layers}
    assert windows == {-1, 7}
    assert model.get_attention_sliding_window_size() == 7


def test_bfloat16_rounds_as_transformers_does(tmp_path):
    directory = make_checkpoint(tmp_path, CheckpointShape(dtype="bfloat16"))
    model, reference = model_host.load(directory, dtype="bfloat16"), load_reference(directory)
    ids = prompt(ROWS + 1)  # more than graphs take, which round less
    expected = reference.logits(ids)
    plain = model_host.all_logits(model, ids)
    model.model.runs_single_rank = False
    assert torch.equal(model_host.all_logits(model, ids), plain)
    with torch.inference_mode():
        states = reference.backbone.bfloat16()(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    theirs = states.float() @ reference.weights["lm_head.weight"].T
    # Random weights amplify rounding: up to a few tenths of a logit.
    assert (plain.float() - expected).abs().mean() < 2 * (theirs - expected).abs().mean()


def test_published_depth(tmp_path_factory):
    """45 layers with three MTP layers behind them, two heads."""
    from tests.support.checkpoints import DEEP

    directory = make_checkpoint(tmp_path_factory.mktemp("deep"), DEEP)
    ids = prompt(12, seed=3)
    model, reference = model_host.load(directory), load_reference(directory)
    assert (model_host.all_logits(model, ids) - reference.logits(ids)).abs().max() < 10 * TOLERANCE


@pytest.mark.parametrize(
    "shape",
    [
        CheckpointShape(window=48, top_k=1, heads=8, sliding_heads=4, kv_groups=4, sliding_kv_groups=4),
        CheckpointShape(heads=2, sliding_heads=8, kv_groups=1, sliding_kv_groups=1, limits=False),
    ],
    ids=["window 48, top-1, 8 and 4 heads", "one KV head, no clamps"],
)
def test_other_shapes(tmp_path, shape):
    directory = make_checkpoint(tmp_path, shape, seed=4)
    ids = prompt(100, seed=4)
    model, reference = model_host.load(directory), load_reference(directory)
    assert (model_host.all_logits(model, ids) - reference.logits(ids)).abs().max() < TOLERANCE


def test_tied_embeddings(tmp_path_factory):
    import json

    directory = make_checkpoint(tmp_path_factory.mktemp("tied"), CheckpointShape(num_mtp=0))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = model_host.load(directory)
    assert model.lm_head is model.model.embed_tokens
