"""What rounds take on a machine whose pace moves."""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

Kind = tuple[int, bool]  # depth; whether looked-up drafts followed
PLAIN: Kind = (0, False)


@dataclass
class RoundTimes:
    """Seconds of rounds by kind: the machine's pace times the kind's share.

    Every round tells the pace, as the lower quartile of the last `window`, since whatever else the machine does only
    ever adds time. A kind's share is what its rounds took beside the last ones of other kinds, `enough` at a time: both
    at one pace. Shares begin as foretold, in any unit, which counts as one measurement; each later one weighs less,
    down to `weight`. Of rounds with looked-up drafts nothing is foretold. Plain arithmetic on numbers handed in.

    foretold: shares by depth. pace: seconds of one unit, 1 before any round.
    """

    foretold: Sequence[float]
    pace: float = 1.0
    window: int = 32
    enough: int = 3
    beside: int = 6
    weight: float = 0.25
    _shares: dict[Kind, float] = field(init=False)
    _measured: Counter[Kind] = field(init=False, default_factory=Counter)
    _rounds: deque[tuple[Kind, float]] = field(init=False)  # the last ones, in seconds of one unit
    _waiting: defaultdict[Kind, list[tuple[float, float]]] = field(
        init=False, default_factory=lambda: defaultdict(list)
    )  # seconds, and the pace of other kinds

    def __post_init__(self):
        self._shares = {(depth, wide): share for depth, share in enumerate(self.foretold) for wide in (False, True)}
        self._rounds = deque(maxlen=self.window)

    def note(self, kind: Kind, seconds: float, in_use: bool) -> None:
        """A round took so long; in_use: other kinds are measured beside this one."""
        compared = not (in_use and self._measured[kind])
        others = [unit for other, unit in self._rounds if other != kind][-self.beside :] if compared else []
        if others:
            self._waiting[kind].append((seconds, median(others)))
            if len(self._waiting[kind]) == self.enough:
                self._measure(kind, self._waiting.pop(kind))
        else:
            self._rounds.append((kind, seconds / self._shares[kind]))
            if not self._measured[kind] and sum(kind == other for other, _ in self._rounds) >= self.enough:
                self._measured[kind] = 1
        if len(self._rounds) >= self.enough:
            self.pace = sorted(unit for _, unit in self._rounds)[len(self._rounds) // 4]

    def _measure(self, kind: Kind, rounds: list[tuple[float, float]]) -> None:
        self._measured[kind] += 1
        _, wide = kind
        weight = max(1 / (self._measured[kind] + (not wide)), self.weight)
        found = median(seconds / pace for seconds, pace in rounds)
        self._shares[kind] *= (found / self._shares[kind]) ** weight
        self._rounds.extend((kind, seconds / self._shares[kind]) for seconds, _ in rounds)

    def measured(self, kind: Kind) -> bool:
        """Whether its share is more than foretold."""
        return self._measured[kind] > 0

    def seconds(self, kind: Kind) -> float:
        """Of a round."""
        return self._shares[kind] * self.pace

    def corrections(self) -> list[float]:
        """By depth, what rounds took for what was foretold, in the unit of the pace."""
        return [self._shares[depth, False] / foretold for depth, foretold in enumerate(self.foretold)]
