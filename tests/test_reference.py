"""The reference itself: transformers against plain torch, and the MTP chain against its definition.

Each feature of the model is also changed on one side to see that the checkpoints notice it: a reference that does not
react to a wrong window cannot find one.
"""

import copy
import dataclasses
import json
import random

import pytest
import torch

from sglang_step35.config import parse_config
from tests.support import plain_mtp as plain
from tests.support.checkpoints import DEEP, CheckpointShape, config_fields, make_checkpoint
from tests.support.reference import Reference, load_reference, plain_hidden

SMALL = CheckpointShape()
SHAPES = {
    "small": SMALL,
    "top-1, no clamps": CheckpointShape(top_k=1, limits=False),
    "groups differ": CheckpointShape(heads=4, kv_groups=4, sliding_heads=6, sliding_kv_groups=1),
    "window 1": CheckpointShape(window=1, num_mtp=1),
    "45+3": DEEP,
}
TOLERANCE = 1e-4  # float32 noise, relative to the largest state; the alterations below do 100 times as much


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """References by shape, built once."""
    built: dict[CheckpointShape, Reference] = {}

    def get(shape: CheckpointShape = SMALL) -> Reference:
        if shape not in built:
            built[shape] = load_reference(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), shape))
        return built[shape]

    return get


def prompt(length: int, seed: int = 0, vocab: int = SMALL.vocab_size) -> list[int]:
    return random.Random(seed).choices(range(8, vocab), k=length)


def distance(states: torch.Tensor, others: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry of `states`."""
    return float((states - others).abs().max() / states.abs().max())


# --- The backbone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_and_plain_torch_agree(references, name):
    reference, ids = references(SHAPES[name]), prompt(30)
    assert distance(reference.hidden_before_norm(ids), plain_hidden(reference, ids)) < TOLERANCE


ALTERATIONS = {
    "window one longer": {"sliding_window": SMALL.window + 1},
    "window one shorter": {"sliding_window": SMALL.window - 1},
    "no llama3": {"yarn_only_types": []},
    "llama3 everywhere": {"yarn_only_types": ["full_attention", "sliding_attention"]},
    "one theta": {"rope_theta": [10000.0] * 12},
    "fully rotary": {"partial_rotary_factors": [1.0] * 12},
    "no routed clamp": {"swiglu_limits": [0.0] * 12},
    "no shared clamp": {"swiglu_limits_shared": [0.0] * 12},
    "unscaled experts": {"moe_router_scaling_factor": 1.0},
    "fewer experts": {"moe_top_k": SMALL.top_k - 1},
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_alterations_show(references, name):
    reference, ids = references(), prompt(30)
    altered = copy.copy(reference)
    altered.fields = reference.fields | ALTERATIONS[name]
    assert distance(reference.hidden_before_norm(ids), plain_hidden(altered, ids)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["moe.router_bias", "self_attn.g_proj.weight", "self_attn.k_norm.weight"])
def test_weights_that_are_easily_forgotten_show(references, name):
    reference, ids = references(), prompt(30)
    altered = copy.copy(reference)
    altered.weights = {k: w * 0 if k.endswith(name) else w for k, w in reference.weights.items()}
    assert distance(reference.hidden_before_norm(ids), plain_hidden(altered, ids)) > 100 * TOLERANCE


def test_router_bias_chooses_and_does_not_weigh():
    """One token, three experts that return their number: the bias picks 1 and 2, the scores alone weigh them."""
    layer = dataclasses.replace(plain.layer_fields(config_fields(SMALL), 3), top_k=2, scaling_factor=2.0, limit=9e9)
    scores = torch.tensor([0.9, 0.6, 0.2])
    experts = torch.tensor([1.0, 2.0, 4.0])
    ones = torch.ones(3, 1, 1)
    weights = {
        "moe.gate.weight": scores.logit()[:, None],
        "moe.router_bias": torch.tensor([-1.0, 0.0, 0.5]),
        "moe.gate_proj.weight": ones,
        "moe.up_proj.weight": ones,
        "moe.down_proj.weight": (experts / torch.nn.functional.silu(torch.ones(()))).view(3, 1, 1),
        **{f"share_expert.{part}_proj.weight": torch.zeros(1, 1) for part in ("gate", "up", "down")},
    }
    out = plain.experts(torch.ones(1, 1), weights, layer)
    assert out.item() == pytest.approx(2.0 * (0.6 * 2 + 0.2 * 4) / 0.8, rel=1e-5)


def test_window_counts_the_own_key():
    """In one sliding layer row 20 depends on rows 13 to 20 for a window of 8, and on no other."""
    layer = plain.layer_fields(config_fields(SMALL), 1)
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (96, 64), "k": (32, 64), "v": (32, 64), "o": (64, 96), "g": (6, 64)}
    weights = {f"self_attn.{n}_proj.weight": torch.randn(*s, generator=generator) / 8 for n, s in shapes.items()}
    weights |= {f"self_attn.{n}_norm.weight": torch.zeros(16) for n in "qk"}
    x = torch.randn(24, 64, generator=generator)
    before = plain.attention(x, weights, layer)[20]
    moved = []
    for row in range(24):
        changed = x.clone()
        changed[row] += 1
        moved.append(not torch.equal(plain.attention(changed, weights, layer)[20], before))
    assert [row for row in range(24) if moved[row]] == list(range(13, 21))


def test_clamp_is_after_the_activation():
    one = torch.ones(1, 1)
    for x, w in ((5.0, 2.0), (-5.0, -2.0), (0.1, 0.1)):
        out = plain.swiglu(one, one * x, one * w, one, 0.7)
        silu = torch.nn.functional.silu(torch.tensor(x))
        assert out.item() == pytest.approx(min(silu.item(), 0.7) * max(-0.7, min(w, 0.7)))


def test_logits_are_far_from_uniform_and_from_constant(references):
    logprobs = references().logprobs(prompt(30))
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    assert 0.5 < entropy < 5.0 < torch.log(torch.tensor(512.0))
    assert logprobs.exp().sum(-1).allclose(torch.ones(30), atol=1e-5)
    assert len(set(references().greedy(prompt(30), 32))) > 10


def test_hidden_is_before_the_final_norm(references):
    reference, ids = references(), prompt(12)
    normed = plain.rms_norm(reference.hidden_before_norm(ids), reference.weights["model.norm.weight"], 1e-5)
    logits = normed @ reference.weights["lm_head.weight"].T
    assert logits.log_softmax(-1).allclose(reference.logprobs(ids), atol=TOLERANCE)


def test_greedy_with_a_cache_is_greedy(references):
    reference, ids = references(), prompt(20)
    tokens = reference.greedy(ids, 24)
    logits = reference.logits([*ids, *tokens])
    assert tokens == logits[len(ids) - 1 : -1].argmax(-1).tolist()
    assert reference.greedy(ids, 24, eos=(tokens[5],)) == tokens[: tokens.index(tokens[5]) + 1]


# --- MTP ------------------------------------------------------------------------------------------------------------


def test_mtp_logits_shapes(references):
    assert [tuple(x.shape) for x in references().mtp_logits(prompt(20))] == [(19, 512), (18, 512), (17, 512)]


@pytest.mark.parametrize("depth", range(3))
def test_mtp_row_reads_up_to_its_newest_token(references, depth):
    """Row 10 of depth i knows x_0 .. x_{11+i}: the last of these matters, the one after does not."""
    reference, ids = references(), prompt(20)
    before = reference.mtp_logits(ids)[depth][10]

    def after(changed: int):
        return reference.mtp_logits([*ids[:changed], ids[changed] ^ 1, *ids[changed + 1 :]])[depth][10]

    assert distance(before, after(11 + depth)) > 100 * TOLERANCE
    assert after(12 + depth).allclose(before, atol=1e-5)


def test_mtp_chain_by_hand(references):
    """Depth 0 and 1 of one checkpoint written out."""
    reference, ids = references(), prompt(14)
    states, embed = reference.hidden_before_norm(ids), reference.weights["model.embed_tokens.weight"]
    rows = states[:-1]
    for depth, logits in enumerate(reference.mtp_logits(ids)[:2]):
        rows = rows[: len(ids) - 1 - depth]
        weights = {
            name.split(f"model.layers.{9 + depth}.")[1]: w
            for name, w in reference.weights.items()
            if f"layers.{9 + depth}." in name
        }
        newest = embed[torch.tensor(ids[1 + depth :])]
        halves = [(newest, "enorm.weight"), (rows, "hnorm.weight")]  # the embedding first
        both = torch.cat([plain.rms_norm(x, weights[name], 1e-5) for x, name in halves], -1)
        rows = both @ weights["eh_proj.weight"].T
        rows = plain.decoder_layer(rows, weights, plain.layer_fields(reference.fields, 9 + depth))
        normed = plain.rms_norm(rows, weights["transformer.shared_head.norm.weight"], 1e-5)
        assert logits.allclose(normed @ weights["transformer.shared_head.output.weight"].T, atol=TOLERANCE)


@pytest.mark.parametrize("length", [2, 3, 20])
def test_drafts_are_teacher_forced_logits_of_the_drafted_sequence(references, length):
    reference, ids = references(), prompt(length)
    drafts = reference.draft(ids, 3)
    for depth, draft in enumerate(drafts):
        assert draft == int(reference.mtp_logits(ids + drafts[:depth])[depth][-1].argmax())
    assert reference.draft(ids, 1) == drafts[:1] and reference.draft(ids, 0) == []


@pytest.mark.parametrize("steps", [1, 3])
def test_speculative_greedy_is_greedy(references, steps):
    reference, ids = references(CheckpointShape(echo=1.5)), prompt(12)
    tokens, accepted = reference.speculative_greedy(ids, 40, steps)
    assert tokens == reference.greedy(ids, 40)
    assert set(accepted) >= {0, steps} and max(accepted) == steps  # the checkpoint accepts in part
    known = [*ids, *reference.greedy(ids, 40 + steps + 1)]
    end = len(ids) + 1
    for matches in accepted:
        drafts, wanted = reference.draft(known[:end], steps), known[end : end + steps]
        assert matches == next((i for i in range(steps) if drafts[i] != wanted[i]), steps)
        end += matches + 1
    assert end - len(ids) >= 40 > end - len(ids) - accepted[-1] - 1


def test_speculative_greedy_stops_at_eos(references):
    reference, ids = references(CheckpointShape(echo=1.5)), prompt(12)
    tokens = reference.greedy(ids, 40)
    for stop in (tokens[0], tokens[7], tokens[13]):
        assert reference.speculative_greedy(ids, 40, 3, eos=(stop,))[0] == tokens[: tokens.index(stop) + 1]


# --- Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_config_is_accepted_by_the_package(name):
    shape = SHAPES[name]
    spec = parse_config(config_fields(shape))
    assert (spec.num_layers, len(spec.mtp_layers), spec.window) == (shape.num_layers, shape.num_mtp, shape.window)


def test_same_seed_same_bytes(tmp_path):
    paths = [make_checkpoint(tmp_path / str(i), SMALL, seed) / "model.safetensors" for i, seed in enumerate((3, 3, 4))]
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again != other


def test_shards_hold_the_same_weights(tmp_path, references):
    directory = make_checkpoint(tmp_path, CheckpointShape(shards=3, embedding_copies=True, shared_head="shared_head"))
    sharded, whole = load_reference(directory), references()
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(sharded.weights) and len(set(index.values())) == 3
    ids = prompt(10)
    for left, right in zip(sharded.mtp_logits(ids), whole.mtp_logits(ids)):
        assert left.equal(right)
    assert {name for name in sharded.weights if "embed_tokens" in name} == {
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.embed_tokens.weight" for i in (9, 10, 11)),
    }


def test_published_weight_names(references):
    shapes = {name: tuple(w.shape) for name, w in references().weights.items()}
    assert shapes["model.layers.3.moe.gate_proj.weight"] == (8, 32, 64)
    assert shapes["model.layers.3.moe.down_proj.weight"] == (8, 64, 32)
    assert shapes["model.layers.3.share_expert.up_proj.weight"] == (32, 64)
    assert shapes["model.layers.0.self_attn.g_proj.weight"] == (4, 64)
    assert shapes["model.layers.1.self_attn.g_proj.weight"] == (6, 64)
    assert shapes["model.layers.9.eh_proj.weight"] == (64, 128)
    assert shapes["model.layers.11.transformer.shared_head.output.weight"] == (512, 64)
    assert "model.layers.9.mlp.up_proj.weight" in shapes and "model.layers.2.mlp.up_proj.weight" in shapes


def test_bfloat16_keeps_the_router_bias(tmp_path):
    from safetensors import safe_open

    with safe_open(make_checkpoint(tmp_path, CheckpointShape(dtype="bfloat16")) / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}
    assert {name for name, dtype in dtypes.items() if dtype != torch.bfloat16} == {
        f"model.layers.{i}.moe.router_bias" for i in range(3, 9)
    }


@pytest.mark.parametrize("vocab", [512, 2048])
def test_tokenizer_round_trip(tmp_path, vocab):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(make_checkpoint(tmp_path, CheckpointShape(vocab_size=vocab)))
    ids = tokenizer.encode("Größe 42\n<think>", add_special_tokens=False)
    assert max(ids) < vocab and tokenizer.decode(ids) == "Größe 42\n<think>"
