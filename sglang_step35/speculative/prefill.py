"""The MTP pass that follows a prefill chunk."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglang_step35.speculative.host_copy import to_device
from sglang_step35.speculative.lag import Lag
from sglang_step35.speculative.lookup import LookUps
from sglang_step35.speculative.pass_input import MTPPassInput, extend_rows
from sglang_step35.speculative.rings import RequestRings


@dataclass(frozen=True)
class Chunks:
    """A prefill batch on the host: positions [prefixes[b], ends[b]) of the tokens ids[b]; final: the prompt ends there.

    decoding: whether the request decodes beside prefills (`--enable-mixed-chunk`). waiting: tokens of the prompts that
    wait behind these.
    """

    pool_idx: list[int]
    rids: list[str]
    prefixes: list[int]
    ends: list[int]
    ids: list
    final: list[bool]
    decoding: list[bool]
    waiting: int

    @classmethod
    def of(cls, batch) -> "Chunks":
        """Of SGLang's batch."""
        prefixes = list(batch.prefix_lens)
        ends = [p + n for p, n in zip(prefixes, batch.extend_lens, strict=True)]
        ids = [req.full_untruncated_fill_ids for req in batch.reqs]
        decoding = {id(req) for req in batch.decoding_reqs or ()}
        left = sum(len(tokens) - end for end, tokens in zip(ends, ids, strict=True))
        return cls(
            pool_idx=[req.kv.req_pool_idx for req in batch.reqs],
            rids=[req.rid for req in batch.reqs],
            prefixes=prefixes,
            ends=ends,
            ids=ids,
            final=[end >= len(tokens) for end, tokens in zip(ends, ids, strict=True)],
            decoding=[id(req) in decoding for req in batch.reqs],
            waiting=batch.prefill_stats.num_pending_tokens - left if batch.prefill_stats else 0,
        )

    def prompts_to_come(self) -> int:
        """Prompts that wait, as many as would be were they as long as these."""
        lengths = [len(tokens) for tokens, decodes in zip(self.ids, self.decoding, strict=True) if not decodes]
        return max(0, self.waiting) * len(lengths) // max(1, sum(lengths))

    def begin_texts(self, texts: LookUps, next_token_ids: list[int]) -> None:
        """From here on tokens are looked up in these requests' prompts and output."""
        for b, final in enumerate(self.final):
            if final:
                texts.begin(self.pool_idx[b], self.rids[b], [*self.ids[b], next_token_ids[b]])


class PrefillPass:
    """Rows, tokens and hidden states of the MTP layers for one prefill batch.

    A chunk's last rows read tokens of the next chunk: those are taken from the prompt, never from
    what was sampled at the chunk's end. Where the prompt ends within the next chunk's first S
    tokens, the rows before the chunk are recomputed with it (`front`).
    Letters: B requests, R rows, S MTP layers, C ring capacity, H hidden size.
    """

    def __init__(self, batch, chunks: Chunks, rings: RequestRings, lag: Lag, req_to_token: Tensor):
        """Reads the rings; `remember` writes them, once the pass's inputs are taken."""
        self.rings = rings
        self.num_layers = lag.num_layers
        self.lag = lag
        self.req_to_token = req_to_token
        self.pool_indices = batch.req_pool_indices
        self.chunks = chunks
        requests = list(zip(chunks.pool_idx, chunks.rids, chunks.prefixes, chunks.decoding, strict=True))
        known = [rings.known_before(*request) for request in requests]
        self.front = [
            min(self.num_layers - 1 + lag.of(index), count) for index, count in zip(chunks.pool_idx, known, strict=True)
        ]
        self.starts = [p - f for p, f in zip(chunks.prefixes, self.front, strict=True)]
        self.firsts = [
            rings.first_after_prefill(index, prefix, count)
            for (index, _, prefix, _), count in zip(requests, known, strict=True)
        ]

    def rows(self, next_token_ids: Tensor) -> MTPPassInput:
        """next_token_ids: [B], the sampled tokens; used where the prompt ends here."""
        lines = [
            list(ids[start + 1 : end + self.num_layers])
            for ids, start, end in zip(self.chunks.ids, self.starts, self.chunks.ends, strict=True)
        ]
        rows = extend_rows(
            starts=self.starts,
            ends=self.chunks.ends,
            lines=lines,
            num_layers=self.num_layers,
            req_to_token=self.req_to_token,
            req_pool_indices=self.pool_indices,
        )
        # Inside a prompt the true tokens are known: what was sampled and drafted goes to spare entries at the end.
        line = torch.cat([rows.line, rows.line.new_zeros(1 + self.num_layers)])
        (final,) = to_device(self.chunks.final, device=line.device)
        draft_at = torch.where(final.bool(), rows.draft_at, 1 + len(rows.line))
        line[draft_at - 1] = next_token_ids.long()
        return replace(rows, line=line, draft_at=draft_at)

    def hidden(self, new: Tensor) -> Tensor:
        """Hidden states [R, H] of all rows: `new` [sum of chunk lengths, H] and the rows before."""
        if not any(self.front):
            return new
        pieces, offset = [], 0
        chunks = self.chunks
        for index, start, prefix, end in zip(chunks.pool_idx, self.starts, chunks.prefixes, chunks.ends, strict=True):
            positions = torch.arange(start, prefix, device=new.device) % self.rings.capacity
            pieces += [self.rings.hidden[index, positions], new[offset : offset + end - prefix]]
            offset += end - prefix
        return torch.cat(pieces)

    def remember(self, rows: MTPPassInput, hidden: Tensor) -> None:
        """Note this prefill, which runs every layer, and put the last C positions of every request into the rings."""
        chunks = self.chunks
        self.rings.begin(chunks.pool_idx, chunks.rids, self.firsts, chunks.ends)
        self.lag.clear(chunks.pool_idx)
        owners: list[int] = []
        picks: list[int] = []
        positions: list[int] = []
        offset = 0
        for index, start, end in zip(chunks.pool_idx, self.starts, chunks.ends, strict=True):
            first = max(start, end - self.rings.capacity)
            positions.extend(range(first, end))
            picks.extend(range(offset + first - start, offset + end - start))
            owners.extend([index] * (end - first))
            offset += end - start
        at, owner, pick = to_device(positions, owners, picks, device=hidden.device)
        self.rings.put(owner, at, hidden[pick])
        # Row t's first line entry is the token at t + 1.
        self.rings.put_tokens(owner, at + 1, rows.line[rows.base[pick]])
