"""The memory that captured MTP passes read. Letters: B requests, N full verify width, W rows per request, L token-line
entries per request, S MTP layers, H hidden size.
"""

from dataclasses import dataclass, fields
from types import SimpleNamespace

import torch
from sglang.srt.model_executor.input_buffers import ForwardInputBuffers
from torch import Tensor

from sglang_step35.speculative.pass_input import MTPPassInput
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.window import Verified


class VerifiedBuffers:
    """What the graph in front of the layers reads of up to B requests: a `Verified` of the full width N.

    A request of the padding has SGLang's pool index 0, which belongs to nobody, and as many positions as its rows need.
    """

    def __init__(self, size: int, settings: MTPSettings, hidden_size: int, dtype, device):
        width = settings.num_draft_tokens
        self.filler = settings.pass_rows - width  # the seq_lens of padding
        with torch.device(device):
            # Three runs, so that one kernel fills them.
            self.numbers = torch.zeros(3 * size, dtype=torch.int64)
            self.padding = torch.tensor([[0], [self.filler], [1]]).repeat(1, size)
            self.tokens = torch.zeros(size, width, dtype=torch.int64)
            self.hidden = torch.zeros(size, width, hidden_size, dtype=dtype)
        self.pad(size)

    def pad(self, size: int) -> None:
        """Nothing but padding."""
        self.numbers[: 3 * size] = self.padding[:, :size].flatten()

    def load(self, verified: Verified, size: int) -> None:
        """Fill in a round, padded to `size` requests. Columns past its width stay as they are, see `window_width`."""
        count, width = verified.tokens.shape
        given = (verified.requests, verified.seq_lens, verified.accept_lens)
        parts = [part for value, row in zip(given, self.padding, strict=True) for part in (value, row[: size - count])]
        torch.cat(parts, out=self.numbers[: 3 * size])
        self.tokens[:count, :width].copy_(verified.tokens)
        self.hidden[:count, :width].copy_(verified.hidden)

    def first(self, size: int) -> Verified:
        """Of passes of `size` requests."""
        requests, seq_lens, accept_lens = self.numbers[: 3 * size].view(3, size)
        return Verified(requests, seq_lens, None, accept_lens, self.tokens[:size], self.hidden[:size])


@dataclass
class PassBuffers(ForwardInputBuffers):
    """What the layers' graphs read of up to B requests; see `MTPPassInput` for the indices.

    positions, out_cache_loc, base: [B W] int64. line: [B L] int64. last, draft_at: [B] int64.
    hidden_states: [B W, H], the backbone's, then every layer's output. drafts: [B, S] int64, the layers'.
    req_pool_indices, seq_lens, extend_seq_lens: [B]. seq_lens_cpu: [B] on the host.
    """

    positions: Tensor
    out_cache_loc: Tensor
    base: Tensor
    line: Tensor
    last: Tensor
    draft_at: Tensor
    hidden_states: Tensor
    drafts: Tensor
    req_pool_indices: Tensor
    seq_lens: Tensor
    extend_seq_lens: Tensor
    seq_lens_cpu: Tensor

    @classmethod
    def allocate(cls, size: int, width: int, num_layers: int, hidden_size: int, dtype, device) -> "PassBuffers":
        """For `size` requests of `width` rows each."""
        with torch.device(device):
            rows = torch.zeros(size * width, dtype=torch.int64)
            requests = torch.zeros(size, dtype=torch.int64)
            return cls(
                positions=rows.clone(),
                out_cache_loc=rows.clone(),
                base=rows.clone(),
                line=torch.zeros(size * (width + num_layers), dtype=torch.int64),
                last=requests.clone(),
                draft_at=requests.clone(),
                hidden_states=torch.zeros(size * width, hidden_size, dtype=dtype),
                drafts=torch.zeros(size, num_layers, dtype=torch.int64),
                req_pool_indices=requests.clone(),
                seq_lens=torch.full_like(requests, width),
                extend_seq_lens=torch.full_like(requests, width, dtype=torch.int32),
                seq_lens_cpu=torch.full((size,), width, dtype=torch.int64, device="cpu"),
            )

    def load(self, rows: MTPPassInput, hidden: Tensor, req_pool_indices: Tensor) -> None:
        """Fill in a whole pass; captured with the rows' computation."""
        values = {
            "positions": rows.positions,
            "out_cache_loc": rows.slots,
            "base": rows.base,
            "line": rows.line,
            "last": rows.last,
            "draft_at": rows.draft_at,
            "hidden_states": hidden,
            "req_pool_indices": req_pool_indices,
            "seq_lens": rows.ends,
        }
        for name, value in values.items():
            getattr(self, name)[: len(value)].copy_(value)

    def load_host(self, ends: Tensor, size: int, filler: int) -> None:
        """The host's copy of seq_lens, padded to `size` requests with `filler`."""
        self.seq_lens_cpu[: len(ends)] = ends
        self.seq_lens_cpu[len(ends) : size] = filler

    def first(self, size: int) -> SimpleNamespace:
        """The views that passes of `size` requests read."""
        total = len(self.last)
        buffers = {field.name: getattr(self, field.name) for field in fields(self)}
        return SimpleNamespace(**{name: buffer[: size * (len(buffer) // total)] for name, buffer in buffers.items()})
