"""What a request pays once for being drafted for, where the MTP layers' KV is left out otherwise."""

from collections import deque
from dataclasses import dataclass, field

_MEMORY = 64.0  # prompts


@dataclass
class EntryCost:
    """The pass of the MTP layers over a prompt's end, spread over the tokens that requests have on average.

    Plain arithmetic on numbers handed in. Old prompts fade; seconds are the lower quartile of the last passes, since
    whatever else the machine does only ever adds time.
    """

    prompts: float = 0.0
    tokens: float = 0.0
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    _begun: float = 0.0  # seconds for chunks inside prompts

    def add_prompts(self, count: int) -> None:
        """So many prompts were prefilled, with the MTP layers or without."""
        if self.prompts > _MEMORY:
            self.prompts, self.tokens = self.prompts / 2, self.tokens / 2
        self.prompts += count

    def add_tokens(self, count: int) -> None:
        """So many tokens were committed."""
        self.tokens += count

    def add_pass(self, prompts: int, seconds: float) -> None:
        """The MTP layers ran over these prompts' ends, or over chunks inside some."""
        self._begun += seconds
        if prompts:
            self._seconds.append(self._begun / prompts)
            self._begun = 0.0

    def per_token(self, running: int) -> float:
        """Seconds for each token of one request, from the prompts before the `running` ones, which have yet to end."""
        if not self._seconds or not self.tokens:
            return 0.0
        entry = sorted(self._seconds)[len(self._seconds) // 4]
        return entry * max(0.0, self.prompts - running) / self.tokens
