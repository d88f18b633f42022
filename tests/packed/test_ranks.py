"""Packed weights over two ranks: every format against a float32 model on what another library reads of its file."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Q

from sglang_step35.bench.servers import free_port
from sglang_step35.model.weights import WeightError
from tests.packed.test_model import converted, k_mix
from tests.packed.test_safetensors import written
from tests.support import model_host, quantised
from tests.support.checkpoints import CheckpointShape
from tests.support.warm import run_ranks

pytestmark = pytest.mark.server
TOLERANCE = 2e-4
PROMPT = list(range(20, 60))
# Per rank a multiple of 32 columns of every matrix, and of 256; experts of the second stay whole.
NARROW = CheckpointShape(
    heads=4, sliding_heads=8, dense_size=128, expert_size=64, shared_size=64, residual=0.5, embedding_copies=True,
    vocab_size=500,
)  # fmt: skip
WIDE = CheckpointShape(
    num_layers=5, hidden_size=256, heads=8, sliding_heads=16, kv_groups=1, head_dim=64, dense_size=512,
    expert_size=256, shared_size=256, experts=4, top_k=2, residual=0.5,
)  # fmt: skip
BY_WIDTH = {  # name -> shape, and what to write
    "Q8_0": (NARROW, lambda name: Q.Q8_0),
    "Q4_0": (NARROW, lambda name: Q.Q4_0),
    "floats": (NARROW, lambda name: Q.F16 if "self_attn" in name else Q.BF16),
    **{name: (NARROW, scheme) for name, scheme in quantised.schemes(32).items()},
    **{name: (NARROW, scheme) for name, scheme in quantised.other_schemes().items()},
}
BY_EXPERTS = {
    "Q8_0": (NARROW, lambda name: Q.Q8_0),
    "K-quants": (WIDE, k_mix),
    "compressed-tensors, groups of 128": (WIDE, quantised.compressed(4, 128)),
    "FP8, experts one by one": (NARROW, quantised.fp8((32, 32), stacked=False)),
    "MXFP4 blocks": (NARROW, quantised.mxfp4(blocks=True)),
}
REFUSED = {  # shape, and what the message says
    "attention": (replace(NARROW, sliding_heads=6), "attn_output.weight.* cut Q8_0 blocks of 32 columns.* fewer ranks"),
    "experts": (replace(NARROW, expert_size=32), "ffn_down_exps.weight.* cut Q8_0 blocks.* --ep-size = --tp-size"),
}


def rank_main(rank: int, paths: list[Path], refused: list[Path], output: Path, port: int, settings: dict) -> None:
    model_host.start_runtime(paths[0], port, dict(tp_rank=rank, pp_rank=0), tp_size=2, **settings)
    found = {}
    for path in paths:
        load = model_host.load if path.is_dir() else model_host.load_gguf
        backbone, mtp = load(path), load(path, draft=True)
        report = mtp.share_with(backbone)
        out = model_host.run(backbone, PROMPT)
        drafts = model_host.mtp_logits(mtp, out.hidden_states, PROMPT)
        found[path] = out.next_token_logits, out.hidden_states, drafts, report
    messages = [failure(path) for path in refused]
    if rank == 0:
        torch.save((found, messages), output)


def failure(file: Path) -> str:
    try:
        model_host.load_gguf(file)
    except WeightError as error:
        return str(error)
    return "no error"


def computed(tmp_path, cases: dict, refused: list[CheckpointShape], **settings):
    """(name -> (rank 0's outputs, reference), messages of the refused shapes)."""
    files = {}
    for name, (shape, kind) in cases.items():
        write = written if isinstance(kind, quantised.Scheme) else converted
        files[name] = write(tmp_path / str(len(files)), shape, kind)
    paths = [path for path, _ in files.values()]
    bad = [converted(tmp_path / f"bad {i}", shape, lambda name: Q.Q8_0)[0] for i, shape in enumerate(refused)]
    run_ranks(rank_main, paths, bad, tmp_path / "out", free_port(), settings)
    found, messages = torch.load(tmp_path / "out", weights_only=False)
    return {name: (found[path], reference) for name, (path, reference) in files.items()}, messages


def assert_the_references(found: dict) -> None:
    """Equal MTP embeddings are still recognised where each rank holds half of them."""
    for name, ((logits, states, drafts, report), reference) in found.items():
        expected = [reference.logits(PROMPT)[-1], reference.hidden_before_norm(PROMPT), *reference.mtp_logits(PROMPT)]
        for ours, theirs in zip([logits[0], states, *drafts], expected, strict=True):
            assert (ours - theirs).abs().max() < TOLERANCE, name
        assert {report[f"layer {i} embedding"] for i in range(3)} == {"backbone"}, name


def test_matrices_divided_by_width(tmp_path):
    found, messages = computed(tmp_path, BY_WIDTH, [shape for shape, _ in REFUSED.values()])
    assert_the_references(found)
    for (_, expected), message in zip(REFUSED.values(), messages, strict=True):
        assert re.search(expected, message)


def test_experts_divided_by_number(tmp_path):
    found, _ = computed(tmp_path, BY_EXPERTS, [], ep_size=2)
    assert_the_references(found)
