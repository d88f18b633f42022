"""Which tokens hold letters of scripts that are not allowed: tables over the whole vocabulary, made once.

Byte-level tokens may begin and end inside a character. A token whose last bytes begin a character is forbidden when
every character they can begin is; one whose first bytes end a character, when the character that is then whole is.
Letters: V vocabulary.
"""

from functools import cache, lru_cache

import numpy as np

from sglang_step35.guards.scripts import allowed_by, has_any, scripts_of
from sglang_step35.guards.vocabulary import Vocabulary, spell

ROWS = 256  # kept: one for each set of scripts and each beginning of a character that was met


class TokenScripts:
    """The scripts of all tokens of a vocabulary.

    Three parts of each token's bytes: `heads`, the rest of a character that began before; the whole characters, flat
    with their owners; `tails`, the beginning of one that ends later. Tags and control tokens have none.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.size = vocabulary.size
        self.heads: dict[tuple[bytes, bool], list[int]] = {}  # with whether there is nothing else
        self.tails: dict[bytes, list[int]] = {}
        texts = []
        for token in range(self.size):
            head, text, tail = split(b"" if vocabulary.is_tag(token) else vocabulary.bytes_of(token))
            texts.append(text)
            if head:
                self.heads.setdefault((head, not text and not tail), []).append(token)
            if tail:
                self.tails.setdefault(tail, []).append(token)
        self._owners = np.repeat(np.arange(self.size), [len(text) for text in texts])
        points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
        letters, self._letters = np.unique(points, return_inverse=True)
        known = scripts_of("".join(map(chr, letters.tolist())))
        self._scripts = [known.get(chr(letter)) for letter in letters.tolist()]
        self.forbidden = lru_cache(maxsize=ROWS)(self._forbidden)

    def _forbidden(self, allowed: frozenset[str], pending: bytes = b"") -> np.ndarray:
        """[V] bool: tokens that must not come next, after a character that has begun with `pending`."""
        if pending:
            return self._completing(self.forbidden(allowed).copy(), allowed, pending)
        foreign = np.array([script is not None and script not in allowed for script in self._scripts], dtype=bool)
        count = np.bincount(self._owners[foreign[self._letters]], minlength=self.size)
        forbidden = count > 0
        for tail, tokens in self.tails.items():
            if not can_begin_allowed(tail, allowed):
                forbidden[tokens] = True
        return forbidden

    def _completing(self, forbidden: np.ndarray, allowed: frozenset[str], pending: bytes) -> np.ndarray:
        for (head, alone), tokens in self.heads.items():
            _, text, tail = split(pending + head)
            goes_on = alone and tail == pending + head
            if any(script not in allowed for script in scripts_of(text).values()) or (
                goes_on and not can_begin_allowed(tail, allowed)
            ):
                forbidden[tokens] = True
        return forbidden


def split(token: bytes) -> tuple[bytes, str, bytes]:
    """A token's bytes as the rest of a character, whole characters and the beginning of one; no text if invalid."""
    start = 0
    while start < len(token) and token[start] & 0xC0 == 0x80:
        start += 1
    return token[:start], *spell(token[start:])


@cache
def can_begin_allowed(beginning: bytes, allowed: frozenset[str]) -> bool:
    """Whether a character of an allowed script, or a shared one, has these first bytes."""
    lead = beginning[0]
    length, lowest = (4, 0x10000) if lead >= 0xF0 else (3, 0x800) if lead >= 0xE0 else (2, 0x80)
    left = 6 * (length - len(beginning))  # bits
    first = lead & (0x7F >> length)
    for byte in beginning[1:]:
        first = first << 6 | byte & 0x3F
    low, high = max(first << left, lowest), min((first + 1) << left, 0x110000)
    return has_any(allowed, "".join(chr(point) for point in range(low, high) if not 0xD800 <= point < 0xE000))


@cache
def token_scripts(vocabulary: Vocabulary) -> TokenScripts:
    """The table of this process."""
    return TokenScripts(vocabulary)


def default_scripts(vocabulary: Vocabulary, prompt) -> frozenset[str]:
    """Those of the prompt's last user message and what goes with them."""
    return allowed_by(vocabulary.last_user_message(prompt))
