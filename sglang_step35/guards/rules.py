"""A request's guards at work, token by token: what the text so far forbids or forces next. No SGLang import.

A state is immutable and belongs to one text, so that what a draft would change is taken back by dropping its state.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from torch import Tensor

from sglang_step35.guards import language, mask
from sglang_step35.guards.loops import Repetition, Tokens
from sglang_step35.guards.scope import Scope
from sglang_step35.guards.settings import Guards
from sglang_step35.guards.thinking import Thinking, after, spent, starts_inside
from sglang_step35.guards.vocabulary import Vocabulary, spell


@dataclass(frozen=True, eq=False)
class State:
    """After some tokens. pending: bytes of a character that has begun. periods: of what repeats too often here."""

    thinking: Thinking
    scope: Scope = Scope()
    pending: bytes = b""
    runs: np.ndarray | None = None
    periods: tuple[int, ...] = ()
    event: dict | None = None  # what the last token brought about


class Rules:
    """The rules of one request. text: its output, which the caller keeps in step with the state."""

    def __init__(self, guards: Guards, vocabulary: Vocabulary, prompt):
        self.guards = guards
        self._vocabulary = vocabulary
        self._tags = vocabulary.tags()
        self._width = mask.words(vocabulary.size)
        self._repetition = Repetition(guards.loop) if guards.loop else None
        self._prompt_thinks = starts_inside(prompt, self._tags)
        if guards.language:
            named = guards.language.scripts
            self.scripts = frozenset(named) if named else language.default_scripts(vocabulary, prompt)
            self._table = language.token_scripts(vocabulary)
            self._allowing = lru_cache(maxsize=16)(self._row)

    def start(self) -> State:
        """Before the first token."""
        runs = self._repetition.start() if self._repetition else None
        return self._judged(State(Thinking(self._prompt_thinks), runs=runs), at=0)

    def after(self, state: State, text: Tokens, token: int) -> State:
        """Once `token` follows `text`, of which `state` is the state."""
        spelled, pending = spell(state.pending + self._vocabulary.bytes_of(token))
        scope, runs, periods = state.scope, None, ()
        if self.guards.language and not state.thinking.inside:
            scope = self._scope(scope, token, spelled)
        if self._repetition:
            runs = self._repetition.after(state.runs, text, token)
            periods = tuple(self._repetition.periods(runs))
        thinking = after(state.thinking, token, self._tags)
        return self._judged(State(thinking, scope, pending, runs, periods), at=text.length)

    def rows(self, state: State, text: Tokens) -> list[Tensor]:
        """Masks [W] of what may come next, the weightier ones first; none where anything may."""
        if state.thinking.forced:
            return [mask.only(state.thinking.forced[0], self._width)]
        found = []
        if state.periods:
            found.append(mask.all_but({int(text.back(p, p)[0]) for p in state.periods}, self._width))
        if self.guards.language and not state.thinking.inside and not state.scope.quotes:
            found.append(self._allowing(state.pending))
        return found

    def _scope(self, scope: Scope, token: int, spelled: str) -> Scope:
        if token in (self._tags.call, self._tags.call_end):
            return scope.call(token == self._tags.call)
        return scope.after(spelled)

    def _judged(self, state: State, at: int) -> State:
        """With what the guards make of it: the way out of `<think>`, or periods that must not go on.

        Nothing is done inside a character, and nothing leads out of a tool call.
        """
        thinking, periods = state.thinking, state.periods
        if state.pending or thinking.forced:
            return replace(state, periods=())
        event: dict = {"guard": "loop" if periods else "reasoning", "at": at}
        if periods:
            event["period"] = periods[0]
        if not thinking.inside or thinking.calling:
            return replace(state, event=event | {"did": "forbade the next repetition"}) if periods else state
        line = self._line(state)
        if line is None:
            return state
        led_out = replace(thinking, forced=self._vocabulary.leads_out(line))
        return replace(state, thinking=led_out, periods=(), event=event | {"did": "ended the thinking"})

    def _line(self, state: State) -> str | None:
        """What ends the thinking now, if anything does."""
        if state.periods and self.guards.loop:
            return self.guards.loop.line
        budget = self.guards.reasoning
        if budget and spent(state.thinking, budget):
            return budget.line if budget.tokens else ""
        return None

    def _row(self, pending: bytes) -> Tensor:
        return mask.allowing(self._table.forbidden(self.scripts, pending))
