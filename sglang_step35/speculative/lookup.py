"""Look-up drafts: what followed the last time a request's text read as it does now.

Texts that echo themselves (a file given in the prompt and edited, a tool's result quoted back) say for many tokens what
comes next, further than the MTP layers reach. Everything here is plain Python on the host.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang_step35.speculative.confidence import Calibration

NGRAM = 5  # tokens that must have occurred before
OCCURRENCES = 8  # latest ones that are compared
REACH = 32  # tokens back that count for the longest


class NGramIndex:
    """A request's text and where each n-gram of it occurred.

    A token costs a dictionary entry, a look-up at most OCCURRENCES x REACH comparisons, however long the text is.
    Memory: below 256 bytes a token, 32 MiB for 128K of them (a test measures it).
    """

    def __init__(self, tokens: Sequence[int] = ()):
        self.tokens = array("i")
        self._latest: dict[bytes, int] = {}  # n-gram -> the end of its last occurrence
        self._previous = array("i", [0] * NGRAM)  # end of an occurrence -> that of the one before, 0 if none
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        first = max(NGRAM, len(self.tokens) + 1)
        self.tokens.extend(tokens)
        for end in range(first, len(self.tokens) + 1):
            gram = self.tokens[end - NGRAM : end].tobytes()
            self._previous.append(self._latest.get(gram, 0))
            self._latest[gram] = end

    def continuation(self, drafts: Sequence[int], count: int) -> list[int]:
        """`count` tokens that followed the text's longest suffix, `drafts` included, where it occurred before.

        Empty where its last NGRAM tokens have not. Of equally long occurrences the latest counts; one that reaches the
        text's end goes on with the drafts and then with what it has continued itself.
        """
        tail = self.tokens[-REACH:] + array("i", drafts)
        if len(tail) < NGRAM:
            return []
        end = self._latest.get(tail[-NGRAM:].tobytes(), 0)
        if end == len(self.tokens) and not drafts:
            end = self._previous[end]
        best, longest = 0, 0
        for _ in range(OCCURRENCES):
            if not end or longest == REACH:
                break
            length = self._common(end, tail)
            if length > longest:
                best, longest = end, length
            end = self._previous[end]
        if not best:
            return []
        after = self.tokens[best : best + count]
        if len(after) < count:
            after.extend(drafts)
        return [after[i % len(after)] for i in range(count)]

    def _common(self, end: int, tail: array) -> int:
        """Tokens before `end` that equal the tail's last ones, up to REACH."""
        most = min(end, len(tail), REACH)
        length = NGRAM
        while length < most and self.tokens[end - length - 1] == tail[-length - 1]:
            length += 1
        return length


@dataclass
class RequestText:
    """One request's text, and its record: how often what was looked up came true, offered or not.

    chain: whether the drafts before held. further: whether each token looked up did, once those before it had.
    """

    rid: str
    index: NGramIndex
    chain: Calibration = field(default_factory=lambda: Calibration(bins=1, hope=0.5, weight=1.0, decay=0.9))
    further: Calibration = field(default_factory=lambda: Calibration(bins=1, hope=0.5, weight=1.0, decay=0.95))
    _foretold: tuple[int, int, list[int]] | None = None  # where it begins, its drafts, and all of its tokens

    def add(self, tokens: Sequence[int]) -> None:
        """The request's next tokens."""
        self.index.extend(tokens)
        if self._foretold is not None:
            self._judge(*self._foretold)

    def look_up(self, drafts: list[int], count: int) -> list[int]:
        """`NGramIndex.continuation`, noted for the record."""
        found = self.index.continuation(drafts, count)
        if found and self._foretold is None:
            self._foretold = (len(self.index), len(drafts), drafts + found)
        return found

    def hope(self, count: int) -> float:
        """Tokens that `count` looked-up ones should add to a round, by the record."""
        (chance,), (rate,) = self.chain.table(), self.further.table()
        return chance * sum(rate**i for i in range(1, count + 1))

    def _judge(self, start: int, drafts: int, foretold: list[int]) -> None:
        actual = self.index.tokens[start : start + len(foretold)].tolist()
        right = 0
        while right < len(actual) and foretold[right] == actual[right]:
            right += 1
        if right == len(actual) < len(foretold):
            return  # the text has to grow first
        self.chain.observe(0.0, right >= drafts)
        for i in range(drafts, min(right + 1, len(foretold))):
            self.further.observe(0.0, right > i)
        self._foretold = None


class LookUps:
    """The texts of the running requests by request-pool index."""

    def __init__(self, longest: int):
        """longest: drafts of a whole chain, the MTP layers' and then as many looked-up ones as there is room for."""
        self.longest = longest
        self._texts: dict[int, RequestText] = {}

    def begin(self, pool_idx: int, rid: str, tokens: list[int]) -> None:
        """A prefill has ended: `tokens` are the prompt and all output so far."""
        text = self._texts.get(pool_idx)
        if text is None or text.rid != rid or text.index.tokens.tolist() != tokens[: len(text.index)]:
            text = self._texts[pool_idx] = RequestText(rid, NGramIndex())
        text.add(tokens[len(text.index) :])

    def keep(self, pool_idx: Sequence[int]) -> None:
        """Drop the texts of all other requests."""
        self._texts = {index: self._texts[index] for index in pool_idx if index in self._texts}

    def add(self, pool_idx: Sequence[int], tokens: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """A round committed the first lengths[b] of tokens[b]."""
        for index, row, length in zip(pool_idx, tokens, lengths, strict=True):
            if index in self._texts:
                self._texts[index].add(row[:length])

    def find(self, pool_idx: Sequence[int], drafts: Sequence[list[int] | None]) -> tuple[list[list[int]], float]:
        """What each request's drafts go on with, or nothing, and how much of it should come true, the requests' mean.

        drafts[b]: all that the MTP layers drafted; None: nothing is looked up for this request.
        """
        found: list[list[int]] = []
        hope = 0.0
        for index, chain in zip(pool_idx, drafts, strict=True):
            text = self._texts.get(index) if chain is not None else None
            found.append(text.look_up(chain, self.longest - len(chain)) if text is not None else [])
            hope += text.hope(len(found[-1])) if text is not None else 0.0
        return found, hope / max(1, len(found))
