"""Drafts that the requests' grammars allow: what is forbidden is cut before it costs a row of a verify step.

A forbidden draft is never accepted, since the target's own choice is masked. Each MTP layer therefore drafts the best
token that is allowed behind the drafts before it, and what was looked up ends before the first forbidden token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sglang_step35.speculative.host_copy import host_reads_are_free

_EVERYTHING = -1  # 32 tokens of a mask: all bits set


class DraftGrammars:
    """A batch's grammars, led ahead of the committed tokens and brought back by `close`.

    A grammar is followed up to its end, or to a token that it forbids: behind that everything is allowed, because the
    request ends there.
    Letters: B requests, V vocabulary.
    """

    def __init__(self, reqs, vocab_size: int):
        """reqs: SGLang's, at least one with a grammar that stands at the last committed token."""
        self._grammars = {b: req.grammar for b, req in enumerate(reqs) if req.grammar is not None}
        self._steps = dict.fromkeys(self._grammars, 0)
        self._followed = set(self._grammars)
        some = next(iter(self._grammars.values()))
        self._mask = some.allocate_vocab_mask(vocab_size=vocab_size, batch_size=len(reqs), device="cpu")
        for b in self._grammars:
            self._fill(b)

    def take(self, b: int, tokens: list[int]) -> int:
        """Lead request b's grammar over these tokens; how many of them it allows."""
        for count, token in enumerate(tokens):
            if b not in self._followed:
                return len(tokens)
            if not (int(self._mask[b, token // 32]) >> (token % 32)) & 1:
                self._leave(b)
                return count
            self._grammars[b].accept_token(token)
            self._steps[b] += 1
            self._fill(b)
        return len(tokens)

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [B, V] with -inf for what must not come next."""
        bits = self._mask[:, :, None] >> torch.arange(32, dtype=torch.int32)
        allowed = (bits & 1).bool().flatten(1)[:, : logits.shape[1]]
        return logits.masked_fill(~allowed, float("-inf"))

    def close(self) -> None:
        """Every grammar back at the committed tokens."""
        for b, steps in self._steps.items():
            if steps:
                self._grammars[b].rollback(steps)

    def _fill(self, b: int) -> None:
        self._mask[b] = _EVERYTHING
        if not self._grammars[b].is_terminated():
            self._grammars[b].fill_vocab_mask(self._mask, b)
            if self._mask[b].any():
                return
        self._leave(b)

    def _leave(self, b: int) -> None:
        self._mask[b] = _EVERYTHING
        self._followed.discard(b)


@contextmanager
def drafting_what_is_allowed(batch, sampler, tokens: Tensor, counts: Tensor) -> Iterator[None]:
    """Meanwhile the sampler of a pass of the MTP layers drafts only what the batch's grammars allow.

    tokens: [B, N] since the last committed one; counts: [B], how many of them there are. Not where reading them
    would make the host wait in each layer.
    """
    if not batch.has_grammar or not host_reads_are_free(tokens.device):
        yield
        return
    sampler.grammars = grammars = DraftGrammars(batch.reqs, batch.sampling_info.vocab_size)
    try:
        for b, (row, count) in enumerate(zip(tokens.tolist(), counts.tolist(), strict=True)):
            grammars.take(b, row[:count])
        yield
    finally:
        grammars.close()


def cut_forbidden(batch, chains: list[list[int]], found: list[list[int]]) -> list[list[int]]:
    """What was looked up behind each request's drafts, up to the first token its grammar forbids."""
    if not batch.has_grammar or not any(found):
        return found
    grammars = DraftGrammars(batch.reqs, batch.sampling_info.vocab_size)
    try:
        return [
            more[: max(0, grammars.take(b, chain + more) - len(chain))]
            for b, (chain, more) in enumerate(zip(chains, found, strict=True))
        ]
    finally:
        grammars.close()
