"""From a verify step to the MTP pass behind it: what the rings take in, and the rows and hidden states they give.

All of it runs on the device alone, so that a CUDA graph can hold it (`graphs.py`). Letters: B requests, W positions of
the window, N of them verified, R rows of the pass, H hidden size, S MTP layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_step35.speculative.host_copy import host_reads_are_free
from sglang_step35.speculative.pass_input import MTPPassInput, window_rows
from sglang_step35.speculative.rings import RequestRings


@dataclass(frozen=True)
class Verified:
    """What a verify step leaves.

    requests: [B] pool indices. seq_lens: [B] committed before the step; seq_lens_cpu: its host copy, None where only
    the device knows. accept_lens: [B], the bonus included. tokens: [B, N], entry j true for j < accept_lens, any valid
    id elsewhere. hidden: [B, N, H], the backbone's before the final norm. All integers int64.
    """

    requests: Tensor
    seq_lens: Tensor
    seq_lens_cpu: Tensor | None
    accept_lens: Tensor
    tokens: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class WindowReader:
    """The state a pass is computed from. req_to_token: SGLang's table of slots by pool index and position."""

    states: RequestRings
    req_to_token: Tensor
    num_layers: int

    def remember(self, verified: Verified) -> None:
        """Put the window's hidden states and tokens into the rings.

        Entries past the accepted ones are garbage that the next round overwrites before use.
        """
        size, width = verified.tokens.shape
        positions = verified.seq_lens[:, None] + torch.arange(1 + width, device=verified.seq_lens.device)
        owners = verified.requests[:, None].expand(size, width)
        self.states.put(owners, positions[:, :-1], verified.hidden)
        self.states.put_tokens(owners, positions[:, 1:], verified.tokens)

    def rows(self, verified: Verified, width: int, num_rows: int) -> tuple[MTPPassInput, Tensor]:
        """The `num_rows` rows of each request that end with its `width` positions behind seq_lens.

        Returns them and the hidden states [R, H] they begin with.
        """
        requests = verified.requests
        start = verified.seq_lens + (width - num_rows)
        rows = window_rows(
            seq_lens=verified.seq_lens,
            seq_lens_cpu=verified.seq_lens_cpu,
            accept_lens=verified.accept_lens,
            width=num_rows,
            verify_width=width,
            known=self.states.known(requests, start, num_rows),
            req_to_token=self.req_to_token,
            req_pool_indices=requests,
            tokens=self.states.token_window(requests, start + 1, num_rows + self.num_layers),
        )
        return rows, self.states.window(requests, start, num_rows).flatten(0, 1)


@dataclass(frozen=True)
class RoundWindow:
    """One round's pass: its rows end with the `width` positions behind the committed length and are `num_rows` each."""

    reader: WindowReader
    verified: Verified
    width: int
    num_rows: int
    silent: Sequence[bool] = ()  # requests that it cannot draft for: none

    @property
    def ends_cpu(self) -> Tensor | None:
        """[B] the position after each request's last row, None where only the device knows."""
        lens = self.verified.seq_lens_cpu
        return None if lens is None else lens.long() + self.width

    def rows(self) -> tuple[MTPPassInput, Tensor]:
        """Remember what was verified; the rows and hidden states [R, H] of an eager pass."""
        self.reader.remember(self.verified)
        rows, hidden = self.reader.rows(self.verified, self.width, self.num_rows)
        if not host_reads_are_free(hidden.device):
            return rows, hidden
        rows, kept = rows.committed()
        return rows, hidden[kept]


@dataclass(frozen=True)
class CatchUp:
    """A pass over given rows: these, and the hidden states [R, H] they begin with.

    silent: requests that it cannot draft for, by their place in the batch; empty: none.
    """

    pass_input: MTPPassInput
    hidden: Tensor
    silent: Sequence[bool] = ()

    def rows(self) -> tuple[MTPPassInput, Tensor]:
        """As of a `RoundWindow`."""
        return self.pass_input, self.hidden
