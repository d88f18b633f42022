"""Texts that repeat: for every distance, how long the text's end has equalled what stood that far before.

An n-gram of p tokens stands r times in a row at the text's end when the last (r - 1) p tokens equal those p before
them. All distances that count are followed, so that a shorter period counts once its multiples do: of `<<<<...` the
first n-gram that is long enough. The cost of a token does not depend on the text's length.
"""

import numpy as np

from sglang_step35.guards.settings import LoopGuard


class Tokens:
    """A growing text whose end may be taken back."""

    def __init__(self) -> None:
        self._ids = np.zeros(1024, dtype=np.int32)
        self.length = 0

    def append(self, token: int) -> None:
        if self.length == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
        self._ids[self.length] = token
        self.length += 1

    def cut(self, count: int) -> None:
        """Take the last `count` tokens back."""
        self.length -= count

    def back(self, first: int, last: int) -> np.ndarray:
        """The tokens `first` .. `last` places before the one to come, those that there are."""
        stop = max(0, self.length - first + 1)
        return self._ids[max(0, self.length - last) : stop][::-1]


class Repetition:
    """The rule of one LoopGuard over runs [D] int32, one for each distance from `tokens` to `longest`."""

    def __init__(self, guard: LoopGuard):
        self.guard = guard
        self._distances = np.arange(guard.tokens, guard.longest + 1, dtype=np.int32)
        self._enough = self._distances * (guard.times - 1)

    def start(self) -> np.ndarray:
        return np.zeros_like(self._distances)

    def after(self, runs: np.ndarray, text: Tokens, token: int) -> np.ndarray:
        """The runs once `token` follows `text`."""
        earlier = text.back(self.guard.tokens, self.guard.longest)
        grown = np.zeros_like(runs)
        known = len(earlier)
        np.multiply(runs[:known] + 1, earlier == token, out=grown[:known])
        return grown

    def periods(self, runs: np.ndarray) -> list[int]:
        """The distances at which the text has repeated for long enough, the shortest first."""
        hits = runs >= self._enough
        return self._distances[hits].tolist() if hits.any() else []
