"""Checkpoints whose widths SGLang would pad on a CPU are served with their own, or refused by the field's name."""

import types
from pathlib import Path

import pytest
import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_executor import model_runner
from sglang.srt.model_loader.loader import get_model_loader
from sglang.srt.runtime_context import get_parallel

from sglang_step35.bench.servers import free_port
from sglang_step35.config import parse_config
from sglang_step35.config_fields import ConfigError
from sglang_step35.model import widths
from sglang_step35.model.causal_lm import Step3p5ForCausalLM
from sglang_step35.model.widths import check_ranks
from tests.support import model_host
from tests.support.checkpoints import NANO_DIR, CheckpointShape, config_fields, make_checkpoint
from tests.support.reference import load_reference
from tests.support.warm import run_ranks

TOLERANCE = 1e-4
RANKS_TOLERANCE = 2e-4
STATES_TOLERANCE = 1e-5  # of the largest: nano's reach hundreds
# None a multiple of 32; over two ranks the shared expert stays whole and the vocabulary is padded.
ODD = CheckpointShape(expert_size=40, shared_size=41, dense_size=100, vocab_size=500)
PROMPT = list(range(20, 60))


def served(directory: Path, draft: bool = False) -> torch.nn.Module:
    """The model as ModelRunner.load_model makes it on a CPU: padded first, where SGLang has its way."""
    config = ModelConfig(str(directory), is_draft_model=draft, dtype="float32")
    config = model_runner.adjust_config_with_unaligned_cpu_tp(config, LoadConfig(), get_parallel().tp_size)
    return get_model_loader(LoadConfig(), config).load_model(model_config=config, device_config=DeviceConfig("cpu"))


def rank_main(rank: int, directory: Path, output: Path, port: int) -> None:
    """One of two ranks, a process of its own."""
    model_host.start_runtime(directory, port, dict(tp_rank=rank, pp_rank=0), tp_size=2)
    backbone, mtp = served(directory), served(directory, draft=True)
    mtp.share_with(backbone)
    out = model_host.run(backbone, PROMPT)
    drafts = model_host.mtp_logits(mtp, out.hidden_states, PROMPT)
    if rank == 0:
        torch.save((out.next_token_logits, out.hidden_states, drafts), output)


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    directory = make_checkpoint(tmp_path_factory.mktemp("odd"), ODD)
    model_host.ensure_runtime(directory)
    return directory


def test_odd_widths_on_one_rank(odd):
    reference, backbone, mtp = load_reference(odd), served(odd), served(odd, draft=True)
    assert backbone.spec == mtp.spec == parse_config(config_fields(ODD))
    mtp.share_with(backbone)
    states = model_host.run(backbone, PROMPT).hidden_states
    found = [model_host.all_logits(backbone, PROMPT), *model_host.mtp_logits(mtp, states, PROMPT)]
    backbone.model.runs_single_rank = False  # SGLang's layers on the same widths
    found.append(model_host.all_logits(backbone, PROMPT))
    drafts = reference.mtp_logits(PROMPT)
    expected = [reference.logits(PROMPT), *drafts, reference.logits(PROMPT)]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.server
@pytest.mark.parametrize("name", ["odd", "nano"])
def test_two_ranks(name, tmp_path):
    directory = NANO_DIR if name == "nano" else make_checkpoint(tmp_path / "checkpoint", ODD)
    run_ranks(rank_main, directory, tmp_path / "out", free_port())
    logits, states, drafts = torch.load(tmp_path / "out")
    reference = load_reference(directory)
    assert (logits[0] - reference.logits(PROMPT)[-1]).abs().max() < RANKS_TOLERANCE
    expected = reference.hidden_before_norm(PROMPT)
    assert (states - expected).abs().max() < STATES_TOLERANCE * expected.abs().max()
    for ours, theirs in zip(drafts, reference.mtp_logits(PROMPT), strict=True):
        assert (ours - theirs).abs().max() < RANKS_TOLERANCE


def test_sglangs_padding_is_why_we_hook(odd):
    """When this fails, SGLang no longer pads here and the hook may go."""
    config = ModelConfig(str(odd), dtype="float32")
    model_runner.adjust_config_with_unaligned_cpu_tp.__wrapped__(config, LoadConfig(), 1)
    assert (config.hf_config.moe_intermediate_size, config.hf_config.intermediate_size) == (64, 128)


def test_other_models_are_padded_as_before(odd):
    config = ModelConfig(str(odd), dtype="float32")
    config.hf_config.architectures = ["LlamaForCausalLM"]
    model_runner.adjust_config_with_unaligned_cpu_tp(config, LoadConfig(), 1)
    assert config.hf_config.moe_intermediate_size == 64


def set_ranks(monkeypatch, attention: int, every: int, experts: int) -> None:
    ranks = types.SimpleNamespace(attn_tp_size=attention, tp_size=every, moe_tp_size=experts)
    monkeypatch.setattr(widths, "get_parallel", lambda: ranks)


REFUSED = {  # shape, ranks (attention, all, experts), the message
    "experts": (CheckpointShape(expert_size=20, heads=8, sliding_heads=8), (8, 8, 8), "moe_intermediate_size is 20"),
    "experts, not over expert ranks": (ODD, (2, 2, 1), None),
    "dense": (CheckpointShape(dense_size=98, heads=4, sliding_heads=4), (4, 4, 4), "intermediate_size is 98"),
    "heads": (CheckpointShape(), (4, 4, 4), "attention_other_setting.num_attention_heads is 6"),
    "heads, full layers": (CheckpointShape(heads=2, sliding_heads=4), (4, 4, 4), "num_attention_heads is 2"),
    "KV heads": (CheckpointShape(heads=3, kv_groups=3, sliding_heads=6), (2, 2, 2), "num_attention_heads is 3"),
    "KV heads copied": (CheckpointShape(heads=8, sliding_heads=8), (8, 8, 8), None),
    "attention by data": (CheckpointShape(dense_size=98), (2, 4, 4), "intermediate_size is 98"),
    "shared expert": (CheckpointShape(shared_size=31), (2, 2, 2), None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ranks_that_do_not_divide(case, monkeypatch):
    shape, ranks, message = REFUSED[case]
    set_ranks(monkeypatch, *ranks)
    spec = parse_config(config_fields(shape))
    if message is None:
        return check_ranks(spec)
    with pytest.raises(ConfigError, match=f"^config field {message}: does not divide by --tp-size {ranks[1]}"):
        check_ranks(spec)


def test_the_refusal_names_every_size_that_serves(monkeypatch):
    spec = parse_config(config_fields(CheckpointShape(heads=16, sliding_heads=16, expert_size=40, dense_size=64)))
    set_ranks(monkeypatch, 16, 16, 16)
    with pytest.raises(ConfigError) as refusal:
        check_ranks(spec)
    expected = "moe_intermediate_size is 40: does not divide by --tp-size 16; use --tp-size 1, 2, 4, 8"
    assert str(refusal.value) == f"config field {expected}"


def test_the_refusal_counts_the_ranks_of_data_parallel_attention(monkeypatch):
    set_ranks(monkeypatch, 4, 8, 1)
    with pytest.raises(ConfigError, match="is 6: does not divide by --tp-size 8, here 4 ranks; use --tp-size 1, 2$"):
        check_ranks(parse_config(config_fields(CheckpointShape())))


@pytest.mark.parametrize(
    "experts, ranks, copies, message",
    [
        (8, 4, 0, None),
        (6, 4, 2, None),
        (8, 3, 0, "^config field moe_num_experts is 8: does not divide by --ep-size 3$"),
        (8, 4, 2, "is 8, with --ep-num-redundant-experts 2: does not divide by --ep-size 4$"),
    ],
)
def test_experts_over_ranks(experts, ranks, copies, message, monkeypatch):
    monkeypatch.setattr(widths, "get_parallel", lambda: types.SimpleNamespace(ep_size=ranks))
    moe = types.SimpleNamespace(ep_num_redundant_experts=copies)
    monkeypatch.setattr(widths, "get_exec", lambda: types.SimpleNamespace(moe=moe))
    config = types.SimpleNamespace(**config_fields(CheckpointShape(experts=experts)))
    if message is None:
        assert Step3p5ForCausalLM.get_model_config_for_expert_location(config).num_logical_experts == experts
        return
    with pytest.raises(ConfigError, match=message):
        Step3p5ForCausalLM.get_model_config_for_expert_location(config)
