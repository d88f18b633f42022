"""The MTP layers' KV computed only where drafts need it, from what every KV slot keeps (`slot_states.py`). CPUs.

Exact KV of the MTP layers costs the same whether drafts pay or not. While nothing is drafted it is left out, of prompts
as well; the first pass with drafts computes it for the positions that count. A sliding layer reads `earlier_keys` back,
and each layer the one before it, so that these are the last S windows at most. Shared prefixes may lack it, too.
Letters: B requests, N verified tokens, S MTP layers, H hidden size, R rows.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from torch import Tensor

from sglang_step35.speculative.adaptive import Foretold
from sglang_step35.speculative.pass_input import MTPPassInput, extend_rows, slot_rows
from sglang_step35.speculative.prefill import Chunks
from sglang_step35.speculative.round_cost import RoundCost
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.slot_states import SlotStates
from sglang_step35.speculative.window import CatchUp, Verified


@dataclass(frozen=True)
class Span:
    """Rows [start, end) of one request's pass; from `exact` on they leave exact KV in every layer."""

    start: int
    exact: int
    end: int


class SlotUpkeep:
    """Which positions have KV of the MTP layers that is exact and stays so, and the passes that give it to more.

    exact: [sliding slots] bool, all but those computed from drafts or not at all.
    """

    def __init__(
        self, settings: MTPSettings, req_to_token_pool, allocator, *, earlier_keys: int, hidden_size: int, dtype
    ):
        """allocator: SGLang's of full and sliding slots. earlier_keys: of the MTP layers. dtype: of hidden states."""
        self.req_to_token = req_to_token_pool.req_to_token
        self.to_sliding = allocator.full_to_swa_index_mapping.numpy()
        rows = settings.state_rows(earlier_keys, len(self.req_to_token))
        self.states = SlotStates(self.req_to_token, len(self.to_sliding), rows, hidden_size, dtype)
        self.reader = None  # of rings, which CUDA graphs read
        # Of a prompt only what its drafts read is computed, behind its last chunk. Otherwise whoever shares it finds
        # exact KV at any length, however long ago the states were given up.
        self.late = settings.adaptive
        self.allocator, self.num_layers, self.earlier_keys = allocator, settings.num_steps, earlier_keys
        self.retained, self.reach = settings.retained(earlier_keys), settings.reach(earlier_keys)
        self.exact = np.zeros(allocator.size_swa + allocator.page_size, bool)
        # By pool index: rows, at most, that a pass has to compute beside a round's own.
        self.debts = [0] * len(self.req_to_token)

    def foretold(self, cost: RoundCost, batch: int) -> Foretold:
        """Of rounds of `batch` requests."""
        return Foretold(cost.by_depth(batch), catch_up=cost.mtp_pass(batch * self.reach))

    def owed(self, pool_idx: Sequence[int]) -> float:
        """What these requests have to catch up with before their next draft, as a share of all they ever read."""
        rows = sum(min(self.reach, self.debts[index]) for index in pool_idx)
        return rows / (self.reach * max(1, len(pool_idx)))

    @contextmanager
    def prefill(
        self, batch, chunks: Chunks, next_token_ids: Tensor, hidden: Tensor, drafts: bool
    ) -> Iterator[CatchUp | None]:
        """The pass behind a prefill; None where nothing is to be drafted, or with `late` before a prompt's end.

        next_token_ids: [B] sampled. hidden: [sum of chunk lengths, H], the backbone's.
        """
        self._take_in(chunks, next_token_ids.tolist(), hidden)
        if not drafts or (self.late and not any(chunks.final)):
            yield None
            return
        since: Sequence[int | None] = chunks.prefixes
        if self.late:
            since = [end if final else None for end, final in zip(chunks.ends, chunks.final, strict=True)]
        with self._catching_up(batch, chunks.pool_idx, since, chunks.ends) as found:
            yield found

    @contextmanager
    def round(self, batch, pool_idx: list[int], verified: Verified, depth: int) -> Iterator[CatchUp | None]:
        """The pass behind a verify step; None where nothing is to be drafted, or slots are short for what is owed."""
        slots = batch.out_cache_loc.numpy()
        self._keep(slots, verified.hidden.flatten(0, 1), verified.tokens.flatten().numpy())
        if depth and not any(self.debts[index] for index in pool_idx):
            yield self._window(verified, slots)
            return
        self._owe(pool_idx, [self.debts[index] + verified.tokens.shape[1] for index in pool_idx])
        if not depth:
            yield None
            return
        ends = (verified.seq_lens + verified.accept_lens).tolist()
        with self._catching_up(batch, pool_idx, ends, ends) as found:
            yield found

    def _take_in(self, chunks: Chunks, next_token_ids: list[int], hidden: Tensor) -> None:
        """Keep the states of a prefill's rows, none of which has its KV yet."""
        owners: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        for b, (index, prefix, end) in enumerate(zip(chunks.pool_idx, chunks.prefixes, chunks.ends, strict=True)):
            owners += [index] * (end - prefix)
            positions += range(prefix, end)
            tokens += chunks.ids[b][prefix + 1 : end + 1]
            tokens += [next_token_ids[b]] * chunks.final[b]
        self._keep(self.states.slots(owners, np.array(positions)), hidden, np.array(tokens))
        self._owe(chunks.pool_idx, chunks.ends)

    def _keep(self, slots: np.ndarray, hidden: Tensor, tokens: np.ndarray) -> None:
        """Hidden states [N, H] and the tokens [N] behind positions with these slots [N], whose KV is yet to come."""
        self.states.keep(slots, hidden, tokens)
        self.exact[self.to_sliding[slots]] = False

    def _window(self, verified: Verified, slots: np.ndarray) -> CatchUp:
        """A round's pass: the rows of committed tokens, and those before them whose KV came from drafts.

        slots: [B * N] of what was verified. Exact are the rows whose tokens are true in the deepest layer, too.
        """
        earlier, (size, width) = self.num_layers - 1, verified.tokens.shape
        lens, accepted = verified.seq_lens.numpy()[:, None], verified.accept_lens.numpy()[:, None]
        offsets = np.arange(-earlier, width)
        positions = lens + offsets
        before = self.states.slots(verified.requests.numpy()[:, None], positions[:, :earlier])
        window = np.concatenate((before, slots.reshape(size, width)), axis=1)
        self.exact[self.to_sliding[window]] = offsets < accepted - earlier
        self.exact[0] = False  # nobody's
        committed = (offsets < accepted) & (positions >= 0)
        return CatchUp(*slot_rows(self.states, positions, window, committed, self.num_layers))

    def _owe(self, pool_idx: Sequence[int], rows: Sequence[int]) -> None:
        for index, count in zip(pool_idx, rows, strict=True):
            self.debts[index] = count

    def _span(self, pool_idx: int, since: int | None, end: int) -> Span:
        """Rows up to `end` that leave exact KV in every layer for all that passes behind `since` read.

        Where there are none (None), or hidden states of the rows are gone, the last row alone, which means nothing.
        """
        nothing = Span(end - 1, end, end)
        if since is None:
            return nothing
        low = max(0, since - self.reach)
        slots = self.states.table[pool_idx, low:end]
        missing = (np.flatnonzero(~self.exact[self.to_sliding[slots[: since - low]]]) + low).tolist()
        start = exact = _first(missing, since - self.retained, since)
        for _ in range(self.num_layers - 1):  # a layer reads the window before it of the layer below
            start = _first(missing, start - self.earlier_keys, start)
        known = bool(self.states.entries(slots[start - low :]).all())
        return Span(start, exact, end) if known else nothing

    @contextmanager
    def _catching_up(
        self, batch, pool_idx: list[int], since: Sequence[int | None], ends: list[int]
    ) -> Iterator[CatchUp | None]:
        """The pass over the rows of `_span`; None where there are not enough slots for it."""
        requests = list(zip(pool_idx, since, ends, strict=True))
        room = self._make_room(batch, lambda: [self._span(*request) for request in requests])
        if room is None:
            yield None
            return
        spans, rows, gone = room
        slots = rows.slots.numpy()
        sliding = self.to_sliding[slots]
        # Exact rows are input of the layers above, but what is before them may be missing: their own KV stays as it is.
        made = replace(rows, slots=torch.from_numpy(np.where(self.exact[sliding], 0, slots)))
        silent = [span.exact == span.end for span in spans]
        with self._lending(gone):
            yield CatchUp(made, self.states.rows(self.states.entries(slots)), silent)
        self._mark(rows, spans, sliding)
        self._owe(pool_idx, [self.reach * owes for owes in silent])

    def _mark(self, rows: MTPPassInput, spans: list[Span], sliding: np.ndarray) -> None:
        """Note what a pass over these rows, in these sliding slots, has made exact."""
        positions = rows.positions.numpy()
        first = np.repeat([span.exact for span in spans], rows.row_counts)
        last = np.repeat([span.end - self.num_layers for span in spans], rows.row_counts)
        self.exact[sliding[(positions >= first) & (positions <= last)]] = True
        self.exact[0] = False

    def _rows(self, batch, spans: list[Span]) -> MTPPassInput:
        requests = batch.req_pool_indices.tolist()
        lines = [
            self.states.tokens[self.states.table[index, span.start : span.end]].tolist()
            for index, span in zip(requests, spans, strict=True)
        ]
        return extend_rows(
            starts=[span.start for span in spans],
            ends=[span.end for span in spans],
            lines=lines,
            num_layers=self.num_layers,
            req_to_token=self.req_to_token,
            req_pool_indices=batch.req_pool_indices,
        )

    def _make_room(self, batch, find_spans: Callable[[], list[Span]]) -> tuple[list[Span], MTPPassInput, Tensor] | None:
        """The spans, their rows, and those of the rows' full slots, each once, whose sliding ones are gone.

        SGLang gives sliding slots back behind the window, and a pass over more rows than a window needs one for each.
        None where there are fewer, whatever the prefix cache gives back: it may give back some of these rows' own.
        """
        for _ in range(2):
            spans = find_spans()
            rows = self._rows(batch, spans)
            gone = rows.slots[torch.from_numpy(self.to_sliding)[rows.slots] == 0].unique()
            short = self._whole_pages(len(gone)) - self.allocator.swa_available_size()
            if short <= 0:
                return spans, rows, gone
            batch.tree_cache.evict_for_alloc(EvictParams(swa_num_tokens=short))
        return None

    @contextmanager
    def _lending(self, slots: Tensor) -> Iterator[None]:
        """Meanwhile these full slots have sliding ones."""
        pool = self.allocator.swa_attn_allocator
        lent = pool.alloc(self._whole_pages(len(slots)))
        self.allocator.set_full_to_swa_mapping(slots, lent[: len(slots)])
        try:
            yield
        finally:
            self.allocator.clear_full_to_swa_mapping(slots)
            pool.free(lent)

    def _whole_pages(self, count: int) -> int:
        return -(-count // self.allocator.page_size) * self.allocator.page_size


def _first(numbers: list[int], at_least: int, otherwise: int) -> int:
    """The first of these ascending numbers that is not less, if it is less than `otherwise`."""
    place = bisect_left(numbers, at_least)
    return min(numbers[place], otherwise) if place < len(numbers) else otherwise
