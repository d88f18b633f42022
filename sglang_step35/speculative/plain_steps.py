"""Several plain decode steps as one round, where none of its requests verifies a draft.

Beside a small model's forward, what the scheduler does between two rounds takes as long, and tokens can leave it in
runs, as accepted drafts do. Letters: B requests, N steps, H hidden size.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sglang_step35.speculative.host_copy import host_reads_are_free
from sglang_step35.speculative.verify import TargetVerifier, VerifyOutcome

# Of the steps, this share may be in vain: those of requests that reach their limit before the last.
_WASTE = 8


def most_steps(batch, reserved: int) -> int:
    """Plain steps that a round of this batch may take.

    reserved: KV slots each request has for the round. One where the scheduler has to look at a token before the next,
    or reports more of a step than its token. On CUDA SGLang overlaps its work with the forward by itself.
    """
    if not batch.reqs or not host_reads_are_free(batch.seq_lens.device):
        return 1
    processors = batch.sampling_info.has_custom_logit_processor
    if batch.has_grammar or processors or batch.return_logprob or batch.return_hidden_states:
        return 1
    left = sorted(req.sampling_params.max_new_tokens - len(req.output_ids) for req in batch.reqs)
    return max(1, min(reserved, left[len(left) // _WASTE]))


def run_steps(verifier: TargetVerifier, batch, bonus: Tensor, count: int) -> VerifyOutcome:
    """`count` plain steps that begin with the tokens `bonus` [B]: one outcome, of which all N tokens are accepted.

    batch.out_cache_loc is then [B * N], as behind a verify step of this width.
    """
    outcomes, slots = [], []
    for _ in range(count):
        outcomes.append(verifier.run(batch, bonus[:, None], None))
        slots.append(batch.out_cache_loc)
        bonus = outcomes[-1].tokens[:, 0]
        batch.seq_lens, batch.seq_lens_sum = outcomes[-1].result.new_seq_lens, None
        if batch.seq_lens_cpu is not None:
            batch.seq_lens_cpu = batch.seq_lens_cpu + 1
    batch.out_cache_loc = torch.stack(slots, dim=1).flatten()
    tokens = torch.cat([outcome.tokens for outcome in outcomes], dim=1)
    accept_lens = torch.full_like(outcomes[-1].accept_lens, count)
    result = replace(
        outcomes[-1].result,
        next_token_ids=tokens.flatten().int(),
        speculative_num_draft_tokens=count,
        accept_lens=accept_lens.int(),
        num_non_draft_tokens_per_req=count,
    )
    hidden = torch.stack([outcome.hidden for outcome in outcomes], dim=1).flatten(0, 1)
    return VerifyOutcome(tokens, accept_lens, hidden, result)
