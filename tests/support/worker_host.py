"""The worker without a server: toy models, and in place of SGLang's scheduler a host that checks every step.

Requests are prefilled whole or in chunks, alone or mixed with decoding ones, share prefixes, join and leave, and reuse
each other's pool indices and slots. After each step the host holds tokens, lengths and drafts against `ToyRequest`.
"""

import random
from types import SimpleNamespace

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative import eagle_info
from sglang.srt.speculative.eagle_info import EagleDraftInput

from sglang_step35.speculative import device, draft, offer, ring_upkeep, verify, worker
from sglang_step35.speculative.acceptance import NO_DRAFT
from sglang_step35.speculative.adaptive import Foretold
from sglang_step35.speculative.depth import DepthPlanner
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.verify_graphs import NarrowStep
from tests.support.plain_lookup import continuation
from tests.support.sliding_slots import SlidingSlots
from tests.support.speculative_flags import speculative_flags
from tests.support.toy_mtp import EARLIER_KEYS, VOCAB, ToyMTP, ToyTarget, target_logits
from tests.support.toy_requests import ToyRequest, sampling_info, sure

POOL, LENGTH, SLOTS = 6, 160, 20_000


class Witness(DepthPlanner):
    """Tells the host how many drafts a round verifies; rounds that were not timed cost the same at any depth.

    needed: the chain tokens of every round so far. most: drafts that the last one might offer.
    """

    def __init__(self, settings):
        super().__init__(settings, lambda batch: Foretold([1.0] * (settings.num_steps + 1)))
        self.needed = []

    def begin_round(self, drafted, offered, confidences, steps=1):
        super().begin_round(drafted, offered, confidences, steps)
        self.offered, self.wide = offered, offered != drafted
        self.needed.append(1 + max(offered))

    def most_offered(self, batch_size):
        self.most = super().most_offered(batch_size)
        return self.most


class Pool:
    """SGLang's request pool: slots of every request's positions."""

    size = POOL

    def __init__(self):
        self.req_to_token = torch.zeros(POOL, LENGTH, dtype=torch.int64)
        self.free_slots = list(range(POOL))

    def available_size(self):
        return len(self.free_slots)


class TargetWorker:
    """SGLang's target worker around the toy target."""

    is_hybrid_swa = True

    def __init__(self, pool: Pool, num_layers: int):
        self.toy = ToyTarget(pool.req_to_token)
        self.sliding_window_size = EARLIER_KEYS
        self.model_config = SimpleNamespace(num_nextn_predict_layers=num_layers, hidden_size=2, vocab_size=VOCAB)
        self.model_runner = SimpleNamespace(
            model_config=self.model_config,
            sliding_window_size=EARLIER_KEYS,
            dtype=torch.int64,
            device=torch.device("cpu"),
            attn_backend="attention",
            decode_cuda_graph_runner="graphs",
        )
        self.verified_by = []  # width, attention, graphs of every verify step

    def forward_batch_generation(self, batch, forward_batch=None, is_verify=False, **_unused):
        batch = batch or forward_batch
        owners = batch.req_pool_indices.tolist()
        if is_verify:
            width = batch.spec_info.draft_token_num
            self.verified_by.append((width, self.model_runner.attn_backend, self.model_runner.decode_cuda_graph_runner))
            firsts, rows = batch.seq_lens.tolist(), batch.input_ids.view(-1, width).tolist()
        else:
            firsts = batch.prefix_lens
            rows = [r.tokens[p : p + n] for r, p, n in zip(batch.reqs, firsts, batch.extend_lens, strict=True)]
        states = [state for at in zip(owners, firsts, rows, strict=True) for state in self.toy.forward(*at)]
        logits = torch.cat([torch.empty(0, VOCAB), *[target_logits(state)[None] for state in states]])
        hidden = torch.tensor([(state, 0) for state in states], dtype=torch.int64).view(-1, 2)
        output = SimpleNamespace(hidden_states=hidden, next_token_logits=logits)
        sampled = None if is_verify else torch.tensor([_after_chunk(r, e) for r, e in zip(batch.reqs, batch.ends)])
        return GenerationBatchResult(logits_output=output, next_token_ids=sampled)


def _after_chunk(request: ToyRequest, end: int) -> int:
    """The sampled token: within a prompt it is another than the prompt's next, as a rule."""
    if end < len(request.tokens):
        return (request.tokens[end] + 1) % VOCAB
    return request.first_token()


class DraftWorker(draft.MTPDraftWorker):
    """The real one, its loop included, around the toy layers instead of a model runner."""

    def __init__(self, server_args, gpu_id, nccl_port, target_worker):
        self.graphs = None
        self.model = ToyMTP(target_worker.toy.req_to_token, target_worker.model_config.num_nextn_predict_layers)
        self.draft_runner = SimpleNamespace(model=self.model, attn_backend=self.model, device=torch.device("cpu"))
        self.draft_worker = SimpleNamespace(alloc_memory_pool=lambda **_: None)

    def _draft_scope(self):
        return torch.inference_mode()

    def _forward_scope(self, forward_batch):
        return torch.inference_mode()


def forward_batch(batch, runner, **_unused):
    """SGLang's ForwardBatch.init_new."""
    return SimpleNamespace(**vars(batch))


def prepare_for_verify(spec_info, pool, batch, target_worker):
    """SGLang's eagle_prepare_for_verify, without slots: the toy target looks them up."""
    batch.input_ids, batch.forward_mode = spec_info.draft_token, ForwardMode.TARGET_VERIFY
    positions = batch.seq_lens[:, None] + torch.arange(spec_info.draft_token_num)
    batch.out_cache_loc = pool.req_to_token[batch.req_pool_indices[:, None], positions].flatten()
    return forward_batch(batch, None), False


def make_worker(
    monkeypatch,
    steps: int,
    adaptive: bool = False,
    full_width: bool = False,
    look_ups: int = 0,
    captured=(),
    sliding: int = 0,
    states: int | None = None,
):
    """A worker over toy models, its memory allocated; full_width: as on CUDA; captured: the narrower widths there.

    sliding: slots of the sliding pool, which lets the worker keep hidden states by slot; 0: it has its rings.
    states: how many of these.
    """
    spec = speculative_flags(steps, look_ups=look_ups, adaptive=adaptive)
    monkeypatch.setattr(worker, "get_spec", lambda: spec)
    monkeypatch.setattr(eagle_info, "get_spec", lambda: spec)
    monkeypatch.setattr(
        worker, "get_parallel", lambda: SimpleNamespace(attn_dp_size=1, pp_size=1, tp_rank=0, tp_group=None)
    )
    monkeypatch.setattr(worker, "attention_backends", lambda: ("torch_native",) * 2)
    monkeypatch.setattr(worker, "MTPDraftWorker", DraftWorker)
    monkeypatch.setattr(draft, "ForwardBatch", SimpleNamespace(init_new=forward_batch))
    monkeypatch.setattr(verify, "eagle_prepare_for_verify", prepare_for_verify)
    monkeypatch.setattr(device, "current_platform", SimpleNamespace(is_out_of_tree=lambda: True))
    if full_width:
        monkeypatch.setattr(draft, "writes_kv_alone", lambda runner: False)
        monkeypatch.setattr(worker, "most_steps", lambda batch, reserved: 1)
        monkeypatch.setattr(offer, "verify_width", lambda needed, narrow, device: narrow.width(needed))
        monkeypatch.setattr(ring_upkeep, "window_width", lambda verified, widest, device: widest)
        monkeypatch.setattr(ring_upkeep, "pass_rows", lambda needed, captured, device: max(needed, captured))
    if states:
        monkeypatch.setattr(MTPSettings, "state_rows", lambda settings, earlier_keys, requests: states)
    pool = Pool()
    args = SimpleNamespace(enable_metrics=False, served_model_name="toy", enable_hierarchical_cache=not sliding)
    made = worker.Step35SpecWorker(args, 0, 0, TargetWorker(pool, 3))
    allocator = SlidingSlots(SLOTS, sliding) if sliding else None
    made.alloc_memory_pool(req_to_token_pool=pool, token_to_kv_pool_allocator=allocator)
    made._draft_worker.model.allocator = allocator
    made.depths = Witness(made.settings)
    for width in captured:
        made.narrow.steps[width] = NarrowStep(f"attention {width}", f"graphs {width}", 0.0)
    return made


class Host:
    """The scheduler's part. `worker` may be changed between steps, e.g. its `depths`."""

    def __init__(self, worker, seed: int = 0):
        self.worker = worker
        self.steps = worker.settings.num_steps
        self.chance = random.Random(seed)
        self.table = worker.req_to_token_pool.req_to_token
        self.sliding = worker._draft_worker.model.allocator
        self.slots = list(range(1, SLOTS))
        self.chance.shuffle(self.slots)
        self.indices = worker.req_to_token_pool.free_slots
        self.cached: list[tuple[list[int], list[int]]] = []  # tokens whose rows are final, and their slots
        self.accepted: list[int] = []
        self.offered: list[int] = []
        self.steps_taken: list[int] = []
        self.count = 0
        # What a request's chain goes on with where the round is a wide one; as the rule of look-ups says.
        self.looked_up = lambda request, count: continuation(request.tokens, request.drafts, count)

    # Requests.

    def admit(self, prompt: list[int], hit: int = 0, donor: list[int] = (), **options) -> ToyRequest:
        """A new request on a random free pool index; hit: positions whose KV is `donor`'s slots."""
        self.count += 1
        options = {"rid": f"r{self.count}", **options}
        index = self.indices.pop(self.chance.randrange(len(self.indices)))
        request = ToyRequest(origin_input_ids=prompt, pool_idx=index, filled=hit, **options)
        self._give_slots(request, donor)
        return request

    def _give_slots(self, request: ToyRequest, donor=()) -> None:
        own = LENGTH - request.filled
        self.table[request.pool_idx] = torch.tensor([*donor[: request.filled], *self.slots[:own]])
        del self.slots[:own]

    def release(self, request: ToyRequest, keep: bool = False) -> None:
        """A request leaves, at any time and without a word to the worker; keep: its KV may be shared."""
        row = self.table[request.pool_idx].tolist()
        final = max(0, request.filled - self._lag(request))
        if keep and request.prefilled and len(self.cached) < 8:
            self.cached.append((request.tokens[:final], row[:final]))
        used = {slot for _, slots in self.cached for slot in slots}
        if self.sliding:
            self.sliding.cached = used
            self.sliding.unmap(self.table[request.pool_idx])
        self.slots[:0] = [slot for slot in row if slot not in used]  # the next request gets them
        self.indices.append(request.pool_idx)

    def _lag(self, request: ToyRequest) -> int:
        """Last positions whose KV must not be shared."""
        return 0 if self.sliding else self.worker.upkeep.lag.of(request.pool_idx)

    def _map(self, request: ToyRequest, count: int) -> None:
        """Sliding slots for the next positions; those behind what the worker asked to keep go, as a rule."""
        if self.sliding:
            row = self.table[request.pool_idx]
            if self.chance.random() < 0.3:
                self.sliding.unmap(row[: max(0, request.filled - self.worker.draft_swa_window)])
            self.sliding.map(row[request.filled : request.filled + count])

    def longest_hit(self, prompt: list[int]) -> tuple[int, list[int]]:
        """Positions of a prompt whose rows some cached request shares, all lookahead tokens included."""
        best = (0, [])
        for tokens, slots in self.cached:
            shared = 0
            while shared < min(len(tokens), len(prompt)) and tokens[shared] == prompt[shared]:
                shared += 1
            best = max(best, (self._reach(min(shared - self.steps, len(prompt) - 1), slots), slots))
        return best if best[0] > 0 else (0, [])

    def _reach(self, hit: int, slots: list[int]) -> int:
        """The longest hit up to this one that has all the sliding slots it needs."""
        if not self.sliding:
            return hit
        retained, mapped = self.worker.draft_swa_window, self.sliding.full_to_swa_index_mapping
        whole = (n for n in range(hit, 0, -1) if mapped[slots[max(0, n - retained) : n]].all())
        return next(whole, 0)

    def retract(self, request: ToyRequest, index: int | None = None) -> None:
        """Out of the pool and in again, on another index or this one, everything to be prefilled anew."""
        self.release(request)
        index = self.chance.choice(self.indices) if index is None else index
        self.indices.remove(index)
        request.pool_idx, request.filled, request.relay = index, 0, None
        self._give_slots(request)

    # Steps.

    @torch.inference_mode()
    def prefill(self, spans: dict[ToyRequest, int], decoding: list[ToyRequest] = (), waiting: int = 0) -> None:
        """The next `spans[request]` positions of each; `decoding` ones share the batch with their bonus token. waiting:
        tokens of other prompts."""
        requests = [*spans, *decoding]
        lengths = [*spans.values(), *[1] * len(decoding)]
        for request, count in zip(requests, lengths, strict=True):
            self._map(request, count)
        batch = self._batch(requests, ForwardMode.EXTEND, [r.filled + n for r, n in zip(requests, lengths)])
        batch.prefix_lens, batch.extend_lens = [r.filled for r in requests], lengths
        batch.ends, batch.decoding_reqs = batch.seq_lens.tolist(), list(decoding) or None
        left = sum(len(r.full_untruncated_fill_ids) - end for r, end in zip(requests, batch.ends, strict=True))
        batch.prefill_stats = SimpleNamespace(num_pending_tokens=left + waiting)
        result = self.worker.forward_batch_generation(batch)
        assert result.accept_lens is None and result.new_seq_lens.tolist() == batch.ends
        for b, request in enumerate(requests):
            request.filled = batch.ends[b]
            if request.filled < len(request.tokens):
                continue  # the scheduler drops a middle chunk's result
            request.output_ids.append(int(result.next_token_ids[b]))
            self._check_drafts(request, result.next_draft_input, b)

    @torch.inference_mode()
    def round(self, requests: list[ToyRequest]) -> None:
        """One round of verify and draft."""
        for request in requests:
            self._map(request, self.worker.settings.num_draft_tokens)
        batch = self._batch(requests, ForwardMode.DECODE, [r.filled for r in requests])
        if requests:
            index, bonus = (torch.stack(rows) for rows in zip(*[r.relay for r in requests]))
            batch.spec_info = EagleDraftInput(topk_index=index, bonus_tokens=bonus)
        if self.chance.random() < 0.5:
            batch.seq_lens_cpu = None  # overlap scheduling does not know them
        published = []
        result = self.worker.forward_batch_generation(batch, on_publish=published.append)
        self._offer(requests)
        assert len(published) == 1 and published[0] is result.new_seq_lens
        width, steps = result.speculative_num_draft_tokens, result.num_non_draft_tokens_per_req
        tokens = result.next_token_ids.view(len(requests), width).tolist()
        self.steps_taken += [steps] * len(requests)
        for b, (request, row, length) in enumerate(zip(requests, tokens, result.accept_lens.tolist(), strict=True)):
            for run in [*([token] for token in row[: steps - 1]), row[steps - 1 : length]]:
                assert run == request.expected_round(), (request.rid, row, length)
                request.output_ids += run
            request.filled += length
            request.spec_verify_ct += 1
            request.update_spec_correct_drafts_histogram(length - steps)
            assert request.filled == int(result.new_seq_lens[b])
            self._check_drafts(request, result.next_draft_input, b)
        self.accepted += [n - steps for n in result.accept_lens.tolist()]
        if requests:
            self.worker.on_verify_complete_cpu(self.accepted[-len(requests) :])

    def _offer(self, requests: list[ToyRequest]) -> None:
        """Hold what the round verified against the requests' drafts, limits and look-ups."""
        offered = self.worker.depths.offered if requests else []
        longest = self.worker.settings.num_draft_tokens - 1
        for request, count in zip(requests, offered, strict=True):
            limit = longest if request.limit is None else request.limit
            request.drafts = request.drafts[: self.worker.depths.most]
            request.proposals = request.proposals[: self.worker.depths.most]
            if self.worker.depths.wide and limit >= longest:
                looked_up = self.looked_up(request, longest - len(request.drafts))
                request.drafts = request.drafts + looked_up
                request.proposals = request.proposals + [sure(token) for token in looked_up]
            assert count == min(limit, len(request.drafts)), (request.rid, count)
            request.drafts = request.drafts[:count]
        self.offered += offered

    def _batch(self, requests: list[ToyRequest], mode: ForwardMode, lengths: list[int]) -> SimpleNamespace:
        retained = self.worker.draft_swa_window
        self.worker._draft_worker.model.floors = {r.pool_idx: r.filled - retained for r in requests}
        lengths = torch.tensor(lengths, dtype=torch.int64)
        return SimpleNamespace(
            forward_mode=mode,
            is_extend_in_batch=False,
            reqs=requests,
            req_pool_indices=torch.tensor([r.pool_idx for r in requests], dtype=torch.int64),
            seq_lens=lengths,
            seq_lens_cpu=lengths.clone(),
            sampling_info=sampling_info(requests),
            spec_info=None,
            decoding_reqs=None,
            prefill_stats=None,
            has_grammar=False,
            return_logprob=False,
            return_hidden_states=False,
            tree_cache=self.sliding,
        )

    def _check_drafts(self, request: ToyRequest, draft_input: EagleDraftInput, b: int) -> None:
        request.relay = draft_input.topk_index[b], draft_input.bonus_tokens[b]
        assert int(draft_input.bonus_tokens[b]) == request.tokens[-1]
        (count,) = self.worker.store.drafts.counts([request.pool_idx])
        found = draft_input.topk_index[b].tolist()
        request.drafts, request.proposals = request.expected_drafts(count)
        assert found == request.drafts + [NO_DRAFT] * (self.steps - count), (request.rid, request.filled)
