"""The MTP pass that follows a prefill chunk."""

from dataclasses import replace

import torch
from torch import Tensor

from sglang_step35.speculative.depth import LayerLag
from sglang_step35.speculative.rows import MTPRows, extend_rows
from sglang_step35.speculative.state import RequestRings


class PrefillPass:
    """Rows, tokens and hidden states of the MTP layers for one prefill batch.

    A chunk's last rows read tokens of the next chunk: those are taken from the prompt, never from
    what was sampled at the chunk's end. Where the prompt ends within the next chunk's first S
    tokens, the rows before the chunk are recomputed with it (`front`).
    Letters: B requests, R rows, S MTP layers, C ring capacity, H hidden size.
    """

    def __init__(self, batch, rings: RequestRings, lag: LayerLag, req_to_token_pool):
        self.rings = rings
        self.num_layers = num_layers = lag.num_layers
        self.req_to_token = req_to_token_pool.req_to_token
        self.pool_indices = batch.req_pool_indices
        self.pool_rows = [req.kv.req_pool_idx for req in batch.reqs]
        self.prefixes = list(batch.prefix_lens)
        self.ends = [p + n for p, n in zip(self.prefixes, batch.extend_lens, strict=True)]
        self.ids = [req.full_untruncated_fill_ids for req in batch.reqs]
        self.final = [end >= len(ids) for end, ids in zip(self.ends, self.ids, strict=True)]
        decoding = {id(req) for req in batch.decoding_reqs or ()}
        known = [
            rings.rows_before(row, req.rid, prefix, id(req) in decoding)
            for row, req, prefix in zip(self.pool_rows, batch.reqs, self.prefixes, strict=True)
        ]
        self.front = [
            min(num_layers - 1 + lag.of(row), count)
            for row, count in zip(self.pool_rows, known, strict=True)
        ]
        self.starts = [p - f for p, f in zip(self.prefixes, self.front, strict=True)]
        firsts = [
            rings.first_known(row, prefix, count)
            for row, prefix, count in zip(self.pool_rows, self.prefixes, known, strict=True)
        ]
        rings.begin(self.pool_rows, [req.rid for req in batch.reqs], firsts, self.ends)
        lag.begin(self.pool_rows)

    def rows(self, next_token_ids: Tensor) -> MTPRows:
        """next_token_ids: [B], the sampled tokens; used where the prompt ends here."""
        lines = [
            list(ids[start + 1 : end + self.num_layers])
            for ids, start, end in zip(self.ids, self.starts, self.ends, strict=True)
        ]
        rows = extend_rows(
            starts=self.starts,
            ends=self.ends,
            lines=lines,
            num_layers=self.num_layers,
            req_to_token=self.req_to_token,
            req_pool_indices=self.pool_indices,
        )
        final = torch.tensor(self.final, device=rows.line.device)
        rows.line[rows.draft_at[final] - 1] = next_token_ids.long()[final]
        # Inside a prompt the true tokens are known: its drafts go to spare entries at the end.
        spare = rows.line.new_zeros(self.num_layers)
        return replace(
            rows,
            line=torch.cat([rows.line, spare]),
            draft_at=torch.where(final, rows.draft_at, len(rows.line)),
        )

    def hidden(self, new: Tensor) -> Tensor:
        """Hidden states [R, H] of all rows: `new` [sum of chunk lengths, H] and the rows before."""
        if not any(self.front):
            return new
        pieces, offset = [], 0
        for row, start, prefix, end in zip(
            self.pool_rows, self.starts, self.prefixes, self.ends, strict=True
        ):
            positions = torch.arange(start, prefix, device=new.device) % self.rings.capacity
            pieces += [self.rings.hidden[row, positions], new[offset : offset + end - prefix]]
            offset += end - prefix
        return torch.cat(pieces)

    def remember(self, rows: MTPRows, hidden: Tensor) -> None:
        """Put the last C positions of every request into the rings."""
        owners, picks, positions = [], [], []
        offset = 0
        for row, start, end in zip(self.pool_rows, self.starts, self.ends, strict=True):
            first = max(start, end - self.rings.capacity)
            positions.extend(range(first, end))
            picks.extend(range(offset + first - start, offset + end - start))
            owners.extend([row] * (end - first))
            offset += end - start
        device = hidden.device
        at, owner = torch.tensor(positions, device=device), torch.tensor(owners, device=device)
        pick = torch.tensor(picks, device=device)
        self.rings.put(owner, at, hidden[pick])
        # Row t's first line entry is the token at t + 1.
        self.rings.put_tokens(owner, at + 1, rows.line[rows.base[pick]])
