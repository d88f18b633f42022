"""Which positions the MTP layers compute in a pass, and which tokens they read there.

Letters: B requests, R rows of a pass (flat over requests), L token-line entries, S MTP layers.
A row is one position t of one request. Layer i at row t reads the token at t + 1 + i, so a pass
over rows [start, end) reads the request's tokens from start + 1 on. Those tokens stand in a flat
"line"; the drafts the layers produce are written into it for the next layer to read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from sglang_step35.speculative.host_copy import to_device
from sglang_step35.speculative.slot_states import SlotStates


@dataclass(frozen=True)
class MTPPassInput:
    """One pass of the MTP layers.

    positions: [R] int64, clamped at 0 (rows before a request's start are computed and ignored).
    slots: [R] int64 KV slots; 0, SGLang's dummy slot, for rows whose KV must not be written.
    line: [L] int64 tokens. base: [R] int64, layer i reads line[base + i].
    draft_at: [B] int64, layer i's draft goes to line[draft_at + i].
    last: [B] int64, the row whose output predicts the draft.
    row_counts: per request rows (host ints). ends: [B] int64, the position after a request's last row; ends_cpu: the
        same on the host, None where only the device knows.
    """

    positions: Tensor
    slots: Tensor
    line: Tensor
    base: Tensor
    draft_at: Tensor
    last: Tensor
    row_counts: list[int]
    ends: Tensor
    ends_cpu: Tensor | None

    def committed(self) -> tuple["MTPPassInput", Tensor]:
        """Without the rows behind each request's last committed one, which drafts that were rejected leave: nobody
        reads their KV. Also the numbers [R'] of the rows that stay. Reads `last` on the host."""
        firsts = list(accumulate(self.row_counts, initial=0))[:-1]
        counts = [last + 1 - first for first, last in zip(firsts, self.last.tolist(), strict=True)]
        numbers = [first + n for first, count in zip(firsts, counts, strict=True) for n in range(count)]
        dropped = [before - now for before, now in zip(self.row_counts, counts, strict=True)]
        kept, fewer, rows = to_device(numbers, dropped, counts, device=self.positions.device)
        found = replace(
            self,
            positions=self.positions[kept],
            slots=self.slots[kept],
            base=self.base[kept],
            last=rows.cumsum(0) - 1,
            row_counts=counts,
            ends=self.ends - fewer,
            ends_cpu=None if self.ends_cpu is None else self.ends_cpu - torch.tensor(dropped),
        )
        return found, kept

    def last_rows(self) -> "MTPPassInput":
        """Each request's last row alone, on the same line; of a pass whose requests' last rows predict the drafts."""
        last = self.last
        return replace(
            self,
            positions=self.positions[last],
            slots=self.slots[last],
            base=self.base[last],
            last=torch.arange(len(last), device=last.device),
            row_counts=[1] * len(last),
        )


def window_rows(
    *,
    seq_lens: Tensor,
    seq_lens_cpu: Tensor | None,
    accept_lens: Tensor,
    width: int,
    verify_width: int,
    known: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    tokens: Tensor,
) -> MTPPassInput:
    """Rows after a verify step: the `width` positions that end with the verify window.

    seq_lens: [B] committed length before the step, seq_lens_cpu its host copy if there is one. accept_lens: [B]
    including the bonus. known: [B, width] bool, whose hidden states are known. tokens: [B, width + S] int64, the
    tokens from the first row's successor on. The row count is the same for every request, so that the pass can be
    captured in a graph.
    """
    batch = len(seq_lens)
    device = seq_lens.device
    positions = (seq_lens + verify_width - width)[:, None] + torch.arange(width, device=device)  # [B, width]
    positions = positions.clamp(min=0)
    slots = req_to_token[req_pool_indices[:, None], positions].long() * known
    row = torch.arange(batch, device=device)
    line_width = tokens.shape[1]
    base = (row * line_width)[:, None] + torch.arange(width, device=device)
    last = width - verify_width + accept_lens.long() - 1  # column of the last committed row
    return MTPPassInput(
        positions=positions.flatten(),
        slots=slots.flatten(),
        line=tokens.flatten(),
        base=base.flatten(),
        draft_at=row * line_width + last + 1,
        last=row * width + last,
        row_counts=[width] * batch,
        ends=seq_lens.long() + verify_width,
        ends_cpu=None if seq_lens_cpu is None else seq_lens_cpu.long() + verify_width,
    )


def slot_rows(
    states: SlotStates, positions: np.ndarray, slots: np.ndarray, committed: np.ndarray, num_layers: int
) -> tuple[MTPPassInput, Tensor]:
    """The committed rows of windows on the host, and their hidden states [R, H].

    positions, slots: [B, W]. committed: [B, W] bool, of each request some neighbours, at least one. Rows whose hidden
    states are not known write no KV.
    """
    size, width = slots.shape
    line = np.zeros((size, width + num_layers), np.int64)
    line[:, :width] = states.tokens[slots]
    places = np.arange(line.size).reshape(line.shape)[:, :width]
    counts, own = committed.sum(1), slots[committed]
    entries, base, positions = states.entries(own), places[committed], positions[committed]
    last = counts.cumsum() - 1
    ends = torch.from_numpy(positions[last] + 1)
    found = MTPPassInput(
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(np.where(entries, own, 0)),
        line=torch.from_numpy(line.reshape(-1)),
        base=torch.from_numpy(base),
        draft_at=torch.from_numpy(base[last] + 1),
        last=torch.from_numpy(last),
        row_counts=counts.tolist(),
        ends=ends,
        ends_cpu=ends,
    )
    return found, states.rows(entries)


def extend_rows(
    *,
    starts: Sequence[int],
    ends: Sequence[int],
    lines: Sequence[Sequence[int]],
    num_layers: int,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
) -> MTPPassInput:
    """Rows of a prefill: positions [starts[b], ends[b]) of every request.

    lines[b]: the known tokens from starts[b] + 1 on, cut to ends[b] - starts[b] + num_layers
    entries; unknown ones are filled by the caller (the sampled token) and by the drafts.
    """
    device = req_to_token.device
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    positions: list[int] = []
    base: list[int] = []
    line: list[int] = []
    draft_at: list[int] = []
    owner: list[int] = []
    for b, (start, end, known) in enumerate(zip(starts, ends, lines, strict=True)):
        count, offset = end - start, len(line)
        positions.extend(range(start, end))
        base.extend(range(offset, offset + count))
        owner.extend([b] * count)
        line.extend(known[: count + num_layers])
        line.extend([0] * (offset + count + num_layers - len(line)))
        draft_at.append(offset + count)
    where, owners, known, first, draft, rows, after = to_device(
        positions, owner, line, base, draft_at, counts, ends, device=device
    )
    return MTPPassInput(
        positions=where,
        slots=req_to_token[req_pool_indices[owners], where].long(),
        line=known,
        base=first,
        draft_at=draft,
        last=rows.cumsum(0) - 1,
        row_counts=counts,
        ends=after,
        ends_cpu=torch.tensor(ends, dtype=torch.int64),
    )


def extend_cache_locs(
    *,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device,
) -> Tensor:
    """KV slots of positions [start_offset, start_offset + draft_token_num): [B * n] int64.

    The portable platform's implementation of SGLang's speculative cache locations.
    """
    columns = start_offset.numpy()[:, None] + np.arange(draft_token_num)
    found = req_to_token.numpy()[req_pool_indices.numpy()[:, None], columns]
    return torch.from_numpy(found.astype(np.int64).reshape(-1))
