"""The target's verify step: run the chain, apply the requests' rules, decide what is accepted.

Letters: B requests, N chain tokens (the bonus token and N - 1 drafts), V vocabulary.
"""

from dataclasses import dataclass

import torch
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.eagle_utils import eagle_prepare_for_verify
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask
from torch import Tensor

from sglang_step35.speculative.acceptance import accept_greedy, accept_sampled
from sglang_step35.speculative.device import chain_verify_input, greedy_choice
from sglang_step35.speculative.host_copy import to_device
from sglang_step35.speculative.penalties import PenaltyRule, count_accepted, penalise
from sglang_step35.speculative.ranks import ALONE, Ranks
from sglang_step35.speculative.sampling import SamplingRule
from sglang_step35.speculative.spans import VERIFY, spanned
from sglang_step35.speculative.state import OutputCounts


@dataclass(frozen=True)
class VerifyOutcome:
    """tokens: [B, N] int64, entry j true for j < accept_lens[b], some id elsewhere; accept_lens: [B] int64.

    hidden: [B * N, H], the backbone's hidden states before the final norm.
    """

    tokens: Tensor
    accept_lens: Tensor
    hidden: Tensor
    result: GenerationBatchResult


class TargetVerifier:
    """Runs and judges verify windows on the target worker."""

    def __init__(self, target_worker, req_to_token_pool, counts: OutputCounts, ranks: Ranks = ALONE):
        self.target_worker = target_worker
        self.req_to_token_pool = req_to_token_pool
        self.counts = counts
        self.ranks = ranks

    @spanned(VERIFY)
    def run(self, batch, chain: Tensor, proposal: Tensor | None, grammar_barrier=None) -> VerifyOutcome:
        """Verify `chain` [B, N] int64 (column 0 the bonus token, -1 where nothing was drafted).

        proposal: [B, N - 1, V] probabilities the drafts were sampled from; None for greedy batches and without drafts.
        """
        ids = chain.clamp(min=0) if chain.shape[1] > 1 else chain
        batch.spec_info = chain_verify_input(batch, self.target_worker, ids)
        grammar_tree = GrammarTree.from_linear_chain(ids) if batch.has_grammar else None
        forward_batch, can_run_graph = eagle_prepare_for_verify(
            batch.spec_info, self.req_to_token_pool, batch, self.target_worker
        )
        output = self.target_worker.forward_batch_generation(batch=None, forward_batch=forward_batch, is_verify=True)
        logits_output = output.logits_output
        if grammar_tree is not None:
            self._mask_grammar(batch, logits_output, grammar_tree, grammar_barrier)
        tokens, accept_lens = self._judge(batch, logits_output, chain, proposal)
        count_accepted(self.counts, batch.reqs, tokens, accept_lens)
        result = _result(batch, tokens, accept_lens, output, can_run_graph, forward_batch)
        return VerifyOutcome(tokens, accept_lens, logits_output.hidden_states, result)

    def _mask_grammar(self, batch, logits_output, tree: GrammarTree, barrier) -> None:
        """Forbid what the grammar does not allow; built after the launch, so it overlaps it."""
        mask = build_grammar_vocab_mask(
            reqs=batch.reqs,
            tree=tree,
            sampling_info=batch.sampling_info,
            device=logits_output.next_token_logits.device,
            barrier=barrier,
        )
        if mask is not None:
            mask.apply(logits_output.next_token_logits)

    def _judge(self, batch, logits_output, chain: Tensor, proposal) -> tuple[Tensor, Tensor]:
        info = batch.sampling_info
        size, width = chain.shape
        flat = self._adjusted(batch, logits_output.next_token_logits, chain)
        logits_output.next_token_logits = flat
        logits = flat.view(size, width, -1)
        drafts = chain[:, 1:]
        if info.is_all_greedy:
            return accept_greedy(drafts, greedy_choice(logits))
        rule = SamplingRule.from_info(info)
        # By the round's first position, which no other round of the request has: each of its coins decides.
        coins = rule.coins(batch.seq_lens.long()[:, None], torch.arange(width, device=chain.device))
        tokens, accept_lens = accept_sampled(drafts, rule.distribution(logits), proposal, coins[:, 1:], coins[:, 0])
        return self.ranks.same(tokens), self.ranks.same(accept_lens)

    def _adjusted(self, batch, logits: Tensor, chain: Tensor) -> Tensor:
        """Logits [B * N, V] after custom processors, penalties, minimum length and bias."""
        info = batch.sampling_info
        width = chain.shape[1]
        if info.has_custom_logit_processor:
            apply_custom_logit_processor(logits, info, num_tokens_in_batch=width)
        for b, req in enumerate(batch.reqs):
            window = slice(b * width, (b + 1) * width)
            rule = PenaltyRule.from_request(req)
            if rule is not None:
                counts, drafts = self.counts.of(req.kv.req_pool_idx, req), chain[b, 1:].clamp(min=0)
                logits[window] = penalise(logits[window].float(), counts, drafts, rule)
            if req.sampling_params.min_new_tokens > 0:
                self._forbid_early_stop(logits[window], req, batch.seq_lens[b])
        if info.logit_bias is not None:
            logits.add_(info.logit_bias.repeat_interleave(width, dim=0))
        return logits

    @staticmethod
    def _forbid_early_stop(logits: Tensor, req, seq_len: Tensor) -> None:
        """Mask stop tokens in the rows [N, V] that come before min_new_tokens."""
        rows = torch.arange(len(logits), device=logits.device)
        generated = seq_len - len(req.origin_input_ids) + 1 + rows
        early = generated < req.sampling_params.min_new_tokens
        (stops,) = to_device(_stop_tokens(req), device=logits.device)
        logits[:, stops] = logits[:, stops].masked_fill(early[:, None], float("-inf"))


def _stop_tokens(req) -> list[int]:
    """Ids that end a request: SGLang's own rule for min_new_tokens."""
    stops = set(req.sampling_params.stop_token_ids or ()) | set(req.eos_token_ids or ())
    if req.tokenizer is not None:
        stops |= set(req.tokenizer.additional_stop_token_ids or ())
        stops.add(req.tokenizer.eos_token_id)
    return sorted(stop for stop in stops if stop is not None)


def _result(
    batch, tokens: Tensor, accept_lens: Tensor, output, can_run_graph: bool, forward_batch
) -> GenerationBatchResult:
    """The scheduler's view of a round; next_draft_input is filled in after drafting."""
    predict = tokens.flatten().int()
    accept_index = None
    if batch.return_logprob:
        accept_index = _accepted_rows(accept_lens, tokens.shape[1])
        compute_spec_logprobs(batch, output.logits_output, predict, accept_index=accept_index)
    return GenerationBatchResult(
        logits_output=output.logits_output,
        next_token_ids=predict,
        can_run_cuda_graph=can_run_graph,
        speculative_num_draft_tokens=tokens.shape[1],
        accept_lens=accept_lens.int(),
        accept_index=accept_index,
        new_seq_lens=batch.seq_lens + accept_lens,
        extra_keep_alive_refs=[forward_batch],
    )


def _accepted_rows(accept_lens: Tensor, width: int) -> Tensor:
    """[B, N] int32 flat rows of the accepted tokens, -1 past them."""
    columns = torch.arange(width, device=accept_lens.device)
    flat = torch.arange(len(accept_lens), device=accept_lens.device)[:, None] * width + columns
    return torch.where(columns < accept_lens[:, None], flat, -1).int()
