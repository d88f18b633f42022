"""The truncated checkpoint of scripts/gpu_check: the published layers, files others read, and drafts as promised."""

import json
import math

import pytest
import torch
from safetensors import safe_open

from scripts.gpu_check.checkpoint import write
from scripts.gpu_check.echo import make_echo
from scripts.gpu_check.layers import all_tensors, file_bytes, fitting, plan_of, truncated
from sglang_step35.assets import NANO
from sglang_step35.config import parse_config
from sglang_step35.planner import PlanError
from tests.support.published_config import published
from tests.support.reference import load_reference

PROMPTS = [[40], [0], [17, 900, 31, 8], list(range(100, 180))]


@pytest.fixture(scope="module")
def echo():
    return make_echo(2304, NANO / "tokenizer.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, echo):
    directory = tmp_path_factory.mktemp("tiny")
    fields = truncated(2, tiny=True)
    total = write(directory, fields, echo)
    assert total == file_bytes(parse_config(fields))
    return directory


def test_layers_are_the_published_ones():
    fields = truncated(5)
    spec, full = parse_config(fields), parse_config(published())
    kinds = [layer.attention.window for layer in spec.layers]
    assert kinds == [None, 512, 512, 512, None, 512, 512, 512]
    assert [layer.moe is None for layer in spec.layers] == [True] * 3 + [False] * 5
    assert [layer.moe.limit for layer in spec.layers[3:]] == [None, None, None, 7, 7]
    assert [layer.limit_shared for layer in spec.layers] == [None] * 7 + [16]
    assert [layer.attention for layer in spec.layers[:8]] == [layer.attention for layer in full.layers[:8]]
    for mine, theirs in zip(spec.mtp_layers, full.mtp_layers, strict=True):
        assert (mine.attention, mine.dense_size) == (theirs.attention, theirs.dense_size)
    assert truncated(42) == published()


def test_bytes_are_those_of_the_published_files():
    """199.4B parameters in all; a layer of experts has 288 x 3 matrices of 4096 x 1280."""
    assert file_bytes(parse_config(published())) == pytest.approx(2 * 199.4e9, rel=0.002)
    step = file_bytes(parse_config(truncated(3))) - file_bytes(parse_config(truncated(2)))
    assert step == pytest.approx(2 * 289 * 3 * 4096 * 1280, rel=0.03)


def test_as_many_layers_as_gpu_and_disk_hold():
    large = fitting(79.6, 1 << 40, 20480, 32)
    plan, larger = (plan_of(truncated(count), 79.6, 20480, 32) for count in (large, large + 1))
    assert plan.fits and not plan.best.reserve.tight
    assert not larger.fits or larger.best.reserve.tight
    small = fitting(79.6, 40 << 30, 20480, 32)
    assert file_bytes(parse_config(truncated(small))) <= 40 << 30 < file_bytes(parse_config(truncated(small + 1)))
    with pytest.raises(PlanError, match=r"24 GiB of GPU memory.*larger GPU, or --tiny"):
        fitting(24, 1 << 40, 20480, 32)
    with pytest.raises(PlanError, match="--moe-layers 1: expected 2 to 42"):
        truncated(1)


def test_files_hold_every_tensor_once(checkpoint):
    fields = json.loads((checkpoint / "config.json").read_text())
    expected = all_tensors(parse_config(fields))
    found = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                assert name not in found
                found[name] = tensors.get_tensor(name)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected
    assert {tensor.dtype for name, tensor in found.items() if "router_bias" not in name} == {torch.bfloat16}
    experts = found["model.layers.3.moe.down_proj.weight"]  # [E, H, width]
    assert experts.float().std().item() == pytest.approx(0.1 / math.sqrt(32), rel=0.05)
    assert len({tuple(expert.flatten()[:8].tolist()) for expert in experts}) == len(experts)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(expected)


def test_shares_are_exact_over_the_cycle(echo):
    cycle, seen, token = echo.spoken.tolist(), [], int(echo.spoken[0])
    for _ in cycle:
        seen.append(token)
        token = int(echo.successor[token])
    assert sorted(seen) == sorted(cycle) and token == seen[0]
    shares = [echo.hits[i, echo.spoken].float().mean().item() for i in range(3)]
    assert shares == pytest.approx([0.85, 0.75, 0.65], abs=1e-3)
    # Independent layers: 1 + p1 + p1 p2 + p1 p2 p3.
    assert echo.accept_length() == pytest.approx(1 + 0.85 * (1 + 0.75 * (1 + 0.65)), abs=0.08)


def test_transformers_says_the_successors_and_accepts_the_drafts(checkpoint, echo):
    """Independent of the code under test: greedy text and every round's accepted drafts, everything recomputed."""
    reference = load_reference(checkpoint)
    for prompt in PROMPTS:
        tokens, accepted = reference.speculative_greedy(prompt, 24, 3)
        expected = echo.text(prompt[-1], 27)
        assert tokens == expected[:24]
        assert [accepted.count(n) for n in range(4)] == [echo.rounds(expected, 24)[n] for n in range(4)]


def test_our_model_loads_it_and_drafts_the_same(checkpoint, echo):
    """Below the server, bfloat16 as it is served."""
    from tests.support import model_host

    backbone, mtp = (model_host.load(checkpoint, draft, dtype="bfloat16") for draft in (False, True))
    mtp.share_with(backbone)
    ids = echo.text(50, 80)
    out = model_host.run(backbone, ids)
    assert model_host.all_logits(backbone, ids).argmax(-1).tolist() == echo.successor[ids].tolist()
    for layer, logits in enumerate(model_host.mtp_logits(mtp, out.hidden_states, ids)):
        newest = torch.tensor(ids[layer + 1 :])
        right = logits.argmax(-1) == echo.successor[newest]
        assert right.tolist() == echo.hits[layer, newest].tolist()
        assert 0.4 < right.float().mean().item() < 1
