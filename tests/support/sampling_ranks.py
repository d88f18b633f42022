"""One of two ranks that decide what to draft and accept, with a clock, a random state and roundings of its own.

Run by tests/speculative/test_ranks.py; the ranks' group is torch's gloo, as SGLang's coordinator would use it.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from sglang_step35.speculative.adaptive import Foretold
from sglang_step35.speculative.depth import DepthPlanner
from sglang_step35.speculative.draft_sampler import DraftSampler
from sglang_step35.speculative.ranks import ALONE, Ranks
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.verify import TargetVerifier

STEPS, REQUESTS, VOCAB, ROUNDS = 3, 4, 50, 120
SECONDS = ([0.010, 0.0115, 0.013, 0.0145], [0.010, 0.030, 0.050, 0.070])  # a round by depth, on either rank


def rank_main(rank: int, output: Path, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    with torch.inference_mode():  # as the scheduler runs its rounds
        alone = depths(ALONE, rank), drafts_and_outputs(ALONE, rank)
        together = depths(Ranks(group()), rank), drafts_and_outputs(Ranks(group()), rank)
    torch.save({"alone": alone, "together": together}, output / str(rank))
    dist.destroy_process_group()


def group() -> SimpleNamespace:
    def broadcast(tensor, src):
        dist.broadcast(tensor, src=src)
        return tensor

    return SimpleNamespace(world_size=2, ranks=[0, 1], cpu_group=dist.group.WORLD, broadcast=broadcast)


def depths(ranks: Ranks, rank: int) -> list[int]:
    """The depth of every round of one request whose drafts are mostly accepted."""
    now = [0.0]
    settings = MTPSettings(STEPS, adaptive=True)
    planner = DepthPlanner(settings, lambda batch: Foretold(SECONDS[rank]), clock=lambda: now[0], ranks=ranks)
    chosen = [STEPS]
    for _ in range(ROUNDS):
        planner.begin_round([chosen[-1]], [chosen[-1]], [[]])
        now[0] += SECONDS[rank][chosen[-1]]
        planner.observe([min(2, chosen[-1])])
        chosen.append(planner.next_depth(1))
    return chosen


def drafts_and_outputs(ranks: Ranks, rank: int) -> tuple:
    """Drafts, their confidences, and what a sampled round accepts."""
    logits = torch.randn(REQUESTS, VOCAB, generator=torch.Generator().manual_seed(7)) + rank * 1e-3
    info = SimpleNamespace(
        is_all_greedy=False, is_any_greedy=False,
        temperatures=torch.ones(REQUESTS, 1), top_ks=torch.full((REQUESTS,), VOCAB),
        need_top_k_sampling=False, need_top_p_sampling=False, need_min_p_sampling=False, sampling_seed=None,
        has_custom_logit_processor=False, logit_bias=None,
    )  # fmt: skip
    rule = SimpleNamespace(stops=lambda confidences: False)
    positions = torch.zeros(REQUESTS, dtype=torch.int64)
    sampler = DraftSampler(info, positions, num_steps=STEPS, stop_rule=rule, ranks=ranks)
    drafts = torch.stack([sampler(layer, logits.roll(layer, 1)) for layer in range(STEPS)], 1)
    chain = torch.cat([torch.zeros(REQUESTS, 1, dtype=torch.int64), drafts], 1)
    params = SimpleNamespace(
        frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0
    )  # fmt: skip
    reqs = [SimpleNamespace(sampling_params=params)] * REQUESTS
    batch = SimpleNamespace(sampling_info=info, reqs=reqs, seq_lens=positions)
    output = SimpleNamespace(next_token_logits=logits.repeat_interleave(STEPS + 1, 0))
    verifier = TargetVerifier(None, None, None, ranks)
    tokens, lengths = verifier._judge(batch, output, chain, torch.stack(sampler.probs, 1))
    return drafts, sampler.confidences, tokens, lengths
