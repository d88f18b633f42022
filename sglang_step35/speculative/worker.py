"""The speculative worker SGLang's scheduler drives: verify a chain, then draft the next one.

A chain is the MTP layers' drafts and, where they pay, tokens looked up in the request's own text.
A round of a request with m committed positions and the bonus token x_m:
1. verify: the target runs the chain (x_m, drafts) at positions m .. m + N - 1; some prefix of it is
   accepted and the target adds one token, so the request has m' = m + accept_len positions;
2. draft: MTP layer i recomputes rows m - i .. m' - 1 with the true tokens, which makes its KV equal
   a full recompute, and drafts x_{m' + 1 + i} from row m' - 1.
"""

from functools import cached_property

from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.runtime_context import attention_backends, get_parallel, get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker, HiCacheDraftMode, HiCacheDraftPlan
from sglang.srt.speculative.eagle_info import EagleDraftInput
from torch import Tensor

from sglang_step35.hicache.layer_pools import check_plan, layer_pools
from sglang_step35.speculative.acceptance import propose_surely
from sglang_step35.speculative.adaptive import Foretold
from sglang_step35.speculative.depth import DepthPlanner, depth_limit
from sglang_step35.speculative.device import (
    capture_narrow_steps,
    keeps_states_by_slot,
    round_clock,
)
from sglang_step35.speculative.draft import MTPDraftWorker
from sglang_step35.speculative.draft_sampler import DraftSampler
from sglang_step35.speculative.grammar import drafting_what_is_allowed
from sglang_step35.speculative.host_copy import host_reads_are_free, to_device
from sglang_step35.speculative.metrics import CauseMetrics, DraftCounters, count_plain_steps
from sglang_step35.speculative.offer import Offer, Offers
from sglang_step35.speculative.penalties import count_first_tokens
from sglang_step35.speculative.plain_steps import most_steps, run_steps
from sglang_step35.speculative.prefill import Chunks
from sglang_step35.speculative.ranks import Ranks
from sglang_step35.speculative.ring_upkeep import RingUpkeep
from sglang_step35.speculative.round_cost import RoundCost
from sglang_step35.speculative.settings import (
    MTPSettings,
    check_attention_backends,
    check_settings,
    check_unserved,
)
from sglang_step35.speculative.slot_upkeep import SlotUpkeep
from sglang_step35.speculative.spans import PREFILL, ROUND, of_width, spanned
from sglang_step35.speculative.state import RequestStore
from sglang_step35.speculative.verify import TargetVerifier, VerifyOutcome
from sglang_step35.speculative.verify_graphs import NarrowSteps
from sglang_step35.speculative.watchdog import CAUSES, Watchdog
from sglang_step35.speculative.window import CatchUp, Verified


class Step35SpecWorker(BaseSpecWorker):
    """Kept: SGLang's scheduler contract, pools and target worker; replaced: the whole round.

    Letters: B requests, N verify width, S drafts per round, H hidden size, V vocabulary.
    """

    def __init__(self, server_args, gpu_id: int, nccl_port: int, target_worker):
        super().__init__()
        spec = get_spec()
        self._target_worker = target_worker
        hierarchical = server_args.enable_hierarchical_cache
        by_slot = keeps_states_by_slot(target_worker.model_runner.device, target_worker, hierarchical)
        self.settings = MTPSettings.from_spec(spec, by_slot)
        check_unserved(spec)
        check_settings(
            num_steps=spec.speculative_num_steps,
            topk=spec.speculative_eagle_topk,
            num_draft_tokens=spec.speculative_num_draft_tokens,
            num_mtp_layers=target_worker.model_config.num_nextn_predict_layers or 0,
            attention_dp=get_parallel().attn_dp_size,
            pipeline=get_parallel().pp_size,
        )
        check_attention_backends(attention_backends(), target_worker.sliding_window_size)
        self.ranks = Ranks(get_parallel().tp_group)
        self._draft_worker = MTPDraftWorker(server_args, gpu_id, nccl_port, target_worker)
        self.narrow = NarrowSteps(target_worker.model_runner, self.settings.num_draft_tokens)
        self.draft_counters = self.watchdog = None
        if get_parallel().tp_rank == 0:
            name = server_args.served_model_name if server_args.enable_metrics else None
            self.draft_counters = name and DraftCounters(name, self.settings.num_draft_tokens - 1)
            self.watchdog = Watchdog(report=name and CauseMetrics(name, CAUSES))

    @property
    def last_shared_read_runner(self):
        return self._draft_worker.draft_runner

    @property
    def spec_v2_attn_backends(self) -> tuple:
        runners = (self._target_worker.model_runner, self._draft_worker.draft_runner)
        return tuple(runner.attn_backend for runner in runners)

    @property
    def draft_swa_window(self) -> int:
        """Earlier positions the MTP rows before the committed length still read in the sliding layers' own pool."""
        if not self._target_worker.is_hybrid_swa:
            return 0
        earlier_keys = self._target_worker.model_runner.sliding_window_size
        return self.settings.retained(earlier_keys) if earlier_keys else 0

    def alloc_memory_pool(self, memory_pool_config=None, req_to_token_pool=None, token_to_kv_pool_allocator=None):
        super().alloc_memory_pool(memory_pool_config, req_to_token_pool, token_to_kv_pool_allocator)
        runner = self._target_worker.model_runner
        config = runner.model_config
        self.store = RequestStore.allocate(
            self.settings,
            req_to_token_pool.req_to_token.shape[0],
            vocab_size=config.vocab_size,
            device=runner.device,
        )
        states = dict(hidden_size=config.hidden_size, dtype=runner.dtype)
        if self.settings.by_slot:
            slots = req_to_token_pool, token_to_kv_pool_allocator
            self.upkeep = SlotUpkeep(self.settings, *slots, earlier_keys=runner.sliding_window_size, **states)
        else:
            self.upkeep = RingUpkeep(self.settings, req_to_token_pool, device=runner.device, **states)
        self.depths = DepthPlanner(self.settings, self._foretold, round_clock(runner.device), self.ranks)
        self.verifier = TargetVerifier(self._target_worker, req_to_token_pool, self.store.counts, self.ranks)
        self._draft_worker.reader = self.upkeep.reader

    def init_cuda_graphs(self) -> None:
        super().init_cuda_graphs()
        capture_narrow_steps(self.narrow, self.settings, self.ranks)
        self._additional_graph_memory_usage["target_verify"] = self.narrow.gigabytes

    @cached_property
    def _round_cost(self) -> RoundCost:
        models = self._target_worker.model_runner.model, self._draft_worker.draft_runner.model
        return RoundCost.of(*models, self.settings.num_steps)

    def _foretold(self, batch: int) -> Foretold:
        return self.upkeep.foretold(self._round_cost, batch)

    def _build_hicache_draft_plan(self) -> HiCacheDraftPlan:
        """Every MTP layer's KV is written back and loaded with the backbone's."""
        plan = super()._build_hicache_draft_plan()
        if plan.mode is HiCacheDraftMode.NONE:
            return plan
        check_plan(plan)
        pools = layer_pools(self._draft_worker.draft_runner.token_to_kv_pool)
        self._target_worker.model_runner.mtp_draft_device_pools = pools
        return HiCacheDraftPlan(plan.mode, pools)

    def forward_batch_generation(self, batch, on_publish=None, grammar_barrier=None, pp_proxy_tensors=None):
        """One scheduler step: a prefill (chunk) or one round of verify and draft."""
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            return self._prefill(batch, on_publish, pp_proxy_tensors)
        return self._round(batch, on_publish, grammar_barrier)

    @spanned(PREFILL)
    def _prefill(self, batch, on_publish, pp_proxy_tensors):
        result = self._target_worker.forward_batch_generation(
            batch, pp_proxy_tensors=pp_proxy_tensors, capture_hidden_mode=CaptureHiddenMode.FULL
        )
        result.new_seq_lens = batch.seq_lens
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        count_first_tokens(self.store.counts, batch.reqs, result.next_token_ids)
        chunks, sampler, tokens = Chunks.of(batch), self._sampler(batch, batch.seq_lens), result.next_token_ids
        pool = self.req_to_token_pool
        together = min(pool.size, pool.size - pool.available_size() + chunks.prompts_to_come())
        drafts = not self.depths.rests(together) and any(map(depth_limit, batch.reqs))
        with self.upkeep.prefill(batch, chunks, tokens, result.logits_output.hidden_states, drafts) as found:
            if found is not None:
                sampler.silent = found.silent
                with self.depths.entering(sum(chunks.final), len(found.hidden)):
                    self._extend(batch, chunks, tokens, found, sampler)
        self.depths.begin_prompts(sum(chunks.final))
        self.store.note_drafts(chunks.pool_idx, sampler)
        if self.settings.look_ups:
            chunks.begin_texts(self.store.texts, tokens.tolist())
        result.next_draft_input = sampler.draft_input(result.next_token_ids)
        return result

    def _extend(self, batch, chunks: Chunks, tokens: Tensor, found: CatchUp, sampler: DraftSampler) -> None:
        """The MTP pass behind a prefill that sampled tokens [B]."""
        # The scheduler drops what a chunk inside a prompt samples and drafts.
        (final,) = to_device(chunks.final, device=tokens.device)
        with drafting_what_is_allowed(batch, sampler, tokens[:, None], final):
            picks = sampler if any(chunks.final) else None
            self._draft_worker.extend(batch, *found.rows(), self.settings.num_steps, picks)

    @spanned(ROUND)
    def _round(self, batch, on_publish, grammar_barrier):
        draft_input = batch.spec_info or self._idle_input()
        pool_idx = [req.kv.req_pool_idx for req in batch.reqs]
        self.store.begin_round(pool_idx)
        offer = Offers(self.settings, self.store, self.depths, self.narrow).of(batch, pool_idx, draft_input.topk_index)
        steps = 1
        if not any(offer.counts):
            steps = self.depths.plain_steps(len(pool_idx), most_steps(batch, self.settings.num_draft_tokens))
        self.depths.begin_round(offer.drafted, offer.counts, self.store.drafts.confidences(pool_idx), steps)
        if self.watchdog is not None:
            self.watchdog.begin_round(batch.reqs, offer.drafted)
        seq_lens, seq_lens_cpu = batch.seq_lens, _host_lens(batch)
        with self.narrow.serving(offer.width), of_width(offer.width):
            outcome = self._verify(batch, pool_idx, offer, draft_input.bonus_tokens.long(), steps, grammar_barrier)
        if on_publish is not None:
            on_publish(outcome.result.new_seq_lens)
        verified = Verified(
            requests=batch.req_pool_indices,
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens_cpu,
            accept_lens=outcome.accept_lens,
            tokens=outcome.tokens,
            hidden=outcome.hidden.view(*outcome.tokens.shape, -1),
        )
        sampler = self._draft(batch, pool_idx, verified, outcome.result.new_seq_lens)
        bonus = outcome.tokens
        if bonus.shape[1] > 1:
            bonus = bonus.gather(1, (outcome.accept_lens - 1)[:, None])
        outcome.result.next_draft_input = sampler.draft_input(bonus.squeeze(1))
        if self.settings.look_ups:
            self.store.texts.add(pool_idx, outcome.tokens.tolist(), outcome.accept_lens.tolist())
        return outcome.result

    def _verify(self, batch, pool_idx: list[int], offer: Offer, bonus: Tensor, steps: int, barrier) -> VerifyOutcome:
        """The target's part of a round: one verify step of the bonus tokens [B] and what is offered, or plain steps."""
        if steps > 1:
            count_plain_steps(batch.reqs, steps)
            return run_steps(self.verifier, batch, bonus, steps)
        chain = offer.chain(bonus)
        proposal = None
        if not batch.sampling_info.is_all_greedy:  # [B, N - 1, V] are copied here
            proposal = self.store.probs.get(pool_idx, offer.width - 1)
            if offer.counts != offer.drafted:
                propose_surely(proposal, chain[:, 1:], *to_device(offer.drafted, device=chain.device))
        return self.verifier.run(batch, chain, proposal, barrier)

    def _draft(self, batch, pool_idx: list[int], verified: Verified, positions: Tensor) -> DraftSampler:
        """Bring the MTP layers up to the committed length, positions [B], and draft the next chain."""
        depth = self.depths.next_depth(len(pool_idx), self.upkeep.owed(pool_idx))
        if self.settings.adaptive or self.settings.by_slot:  # layers may be left out
            depth = min(depth, max(map(depth_limit, batch.reqs), default=depth))
        sampler = self._sampler(batch, positions, may_stop=depth > 1)
        with self.upkeep.round(batch, pool_idx, verified, depth) as window:
            if window is not None:
                sampler.silent = window.silent
                with drafting_what_is_allowed(batch, sampler, verified.tokens, verified.accept_lens):
                    self._draft_worker.run(batch, window, depth, sampler)
        self.store.note_drafts(pool_idx, sampler)
        return sampler

    def on_verify_complete_cpu(self, num_correct_drafts_per_req, batch_size: int = 0) -> None:
        """SGLang's report of a round's accepted drafts per request, on the host."""
        offered, accepted = self.depths.observe(num_correct_drafts_per_req)
        if self.draft_counters is not None:
            self.draft_counters.add(offered, accepted)
        if self.watchdog is not None:
            self.watchdog.observe(num_correct_drafts_per_req)

    def _sampler(self, batch, positions: Tensor, may_stop: bool = False) -> DraftSampler:
        # Where reading a confidence waits for the device, passes run to their planned depth.
        asks = may_stop and host_reads_are_free(positions.device)
        return DraftSampler(
            batch.sampling_info,
            positions,
            num_steps=self.settings.num_steps,
            stop_rule=self.depths.stop_rule(len(batch.reqs)) if asks else None,
            ranks=self.ranks,
        )

    def _idle_input(self) -> EagleDraftInput:
        runner = self._draft_worker.draft_runner
        return EagleDraftInput.create_idle_input(
            device=runner.device,
            hidden_size=None,
            dtype=None,
            topk=self.settings.num_steps,
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )


def _host_lens(batch) -> Tensor | None:
    """None where the host does not know them: SGLang asks the attention backends whether they need them."""
    known = batch.seq_lens_cpu is not None or not host_reads_are_free(batch.seq_lens.device)
    return batch.seq_lens_cpu if known else batch.seq_lens
