"""What a request pays once for being drafted for, where the MTP layers' KV is left out otherwise."""

from collections import deque
from dataclasses import dataclass, field

_MEMORY = 64.0  # prompts
_SUPPOSED = 256.0  # tokens of a request, which counts as one more


@dataclass
class EntryCost:
    """The pass of the MTP layers over a prompt's end, spread over the tokens that requests have on average.

    Plain arithmetic on numbers handed in. Old prompts fade; a row's seconds are the lower quartile of the last passes,
    since whatever else the machine does only ever adds time.
    """

    prompts: float = 0.0
    tokens: float = 0.0
    _entered: float = 0.0  # prompts with the MTP layers
    _rows: float = 0.0  # of these
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=16))  # of a row

    def add_prompts(self, count: int) -> None:
        """So many prompts were prefilled, with the MTP layers or without."""
        if self.prompts > _MEMORY:
            self.prompts, self.tokens = self.prompts / 2, self.tokens / 2
        self.prompts += count

    def add_tokens(self, count: int) -> None:
        """So many tokens were committed."""
        self.tokens += count

    def add_pass(self, prompts: int, rows: int, seconds: float) -> None:
        """The MTP layers ran over so many rows, the ends of these prompts, or chunks inside some."""
        if self._entered > _MEMORY:
            self._entered, self._rows = self._entered / 2, self._rows / 2
        self._entered += prompts
        self._rows += rows
        self._seconds.append(seconds / rows)

    def per_token(self, running: int) -> float:
        """Seconds for each token of one request, from the prompts before the `running` ones, which have yet to end."""
        if not self._entered:
            return 0.0
        entry = sorted(self._seconds)[len(self._seconds) // 4] * self._rows / self._entered
        return entry * (1 + max(0.0, self.prompts - running)) / (_SUPPOSED + self.tokens)
