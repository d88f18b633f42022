"""Guards as SGLang's grammars: masked before a token is drawn, in plain decoding, prefill and verify windows alike.

SGLang walks a window with its grammar, token by token, fills a row's mask from what came before it, takes the drafts
back, and goes on with what was accepted; it waits for these before it verifies again, under overlap scheduling too.
That is all that guards need, so a request's guards stand around its grammar, or in a grammar's place.
"""

from collections import deque

import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from sglang.srt.utils.common import is_pin_memory_available
from torch import Tensor

from sglang_step35.guards import mask
from sglang_step35.guards.loops import Tokens
from sglang_step35.guards.rules import Rules

HISTORY = 256  # states kept, more than the drafts of any window


class GuardedGrammar(BaseGrammarObject):
    """Replaces nothing; kept: the request's own grammar, which may be None and counts more than any guard, and how
    SGLang applies the masks of xgrammar and llguidance, which these are like."""

    apply_vocab_mask = XGrammarGrammar.apply_vocab_mask

    def __init__(self, rules: Rules, grammar: BaseGrammarObject | None = None):
        super().__init__()
        self.grammar = grammar
        self.events = Events()
        self._rules = rules
        self._text = Tokens()
        self._states = deque([rules.start()], maxlen=HISTORY)
        self._note()

    def accept_token(self, token: int) -> None:
        if self.grammar is not None:
            self.grammar.accept_token(token)
        self.current_token = token
        self._states.append(self._rules.after(self._states[-1], self._text, token))
        self._text.append(token)
        self._note()

    def rollback(self, k: int) -> None:
        if k and self.grammar is not None:
            self.grammar.rollback(k)
        for _ in range(k):
            self._states.pop()
        self._text.cut(k)
        self.events.cut(self._text.length)

    def is_terminated(self) -> bool:
        return self.grammar is not None and self.grammar.is_terminated()

    @property
    def finished(self) -> bool:
        return self._finished

    @finished.setter
    def finished(self, finished: bool) -> None:
        self._finished = finished
        if self.grammar is not None:
            self.grammar.finished = finished

    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device) -> Tensor:
        if self.grammar is not None:
            return self.grammar.allocate_vocab_mask(vocab_size, batch_size, device)
        size = (batch_size, mask.words(vocab_size))
        return torch.full(size, -1, dtype=torch.int32, pin_memory=is_pin_memory_available())

    def fill_vocab_mask(self, vocab_mask: Tensor, idx: int) -> None:
        if self.grammar is not None:
            self.grammar.fill_vocab_mask(vocab_mask, idx)
        for rule in self._rules.rows(self._states[-1], self._text):
            mask.narrow(vocab_mask[idx], rule)

    def move_vocab_mask(self, vocab_mask: Tensor, device) -> Tensor:
        return vocab_mask.to(device, non_blocking=True)

    def _note(self) -> None:
        if self._states[-1].event is not None:
            self.events.add(self._states[-1].event, self._text.length)


class Events:
    """What guards did, each where it did it; SGLang cuts from it what belongs to the tokens it sends.

    Stands for a list with an entry for every output token: a slice of it holds the events of these tokens alone.
    """

    def __init__(self) -> None:
        self._found: list[tuple[int, dict]] = []

    def add(self, event: dict, length: int) -> None:
        """An event of the last of `length` tokens."""
        self._found.append((length, event))

    def cut(self, length: int) -> None:
        """Forget those of tokens after the first `length`."""
        while self._found and self._found[-1][0] > length:
            self._found.pop()

    def __getitem__(self, tokens: slice) -> list[dict]:
        start, stop = tokens.start or 0, tokens.stop
        return [event for _, event in self._found if start <= event["at"] and (stop is None or event["at"] < stop)]
