"""Two ranks on the CPU against the reference: tensor, expert, data and pipeline parallelism."""

import pytest
import torch

from sglang_step35.bench.servers import free_port
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.model_ranks import rank_main
from tests.support.reference import load_reference
from tests.support.warm import run_ranks

TOLERANCE = 2e-4
PROMPTS = [list(range(20, 60)), list(range(100, 125))]

pytestmark = pytest.mark.server


@pytest.mark.parametrize("mode", ["tp", "whole_shared_expert", "ep", "dp", "pp"])
def test_two_ranks(mode, tmp_path):
    directory = make_checkpoint(tmp_path / "checkpoint", CheckpointShape(embedding_copies=True))
    run_ranks(rank_main, directory, tmp_path, free_port(), PROMPTS, mode)
    reference = load_reference(directory)
    ranks = {"dp": (0, 1), "pp": (1,)}.get(mode, (0,))
    for rank in ranks:
        ids = PROMPTS[rank if mode == "dp" else 0]
        logits, states, drafts = torch.load(tmp_path / str(rank))
        assert (logits[0] - reference.logits(ids)[-1]).abs().max() < TOLERANCE
        assert (states - reference.hidden_before_norm(ids)).abs().max() < TOLERANCE
        for found, expected in zip(drafts, reference.mtp_logits(ids)):
            assert (found - expected).abs().max() < TOLERANCE
    if mode == "tp":
        for found, expected in zip(torch.load(tmp_path / "rounded 0"), reference.mtp_logits(PROMPTS[0])):
            assert (found - expected).norm() < 0.03 * expected.norm()
