"""The look-up rule by brute force: every place of the text, token by token. No code of the package under test."""

from collections.abc import Sequence

NGRAM, OCCURRENCES, REACH = 5, 8, 32


def common_suffix(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[-1 - length] == b[-1 - length]:
        length += 1
    return length


def continuation(text: Sequence[int], drafts: Sequence[int], count: int, ngram: int = NGRAM) -> list[int]:
    """`count` tokens after the best of the latest places where the end of text + drafts stood before, or none."""
    line = [*text, *drafts]
    shared = {end: common_suffix(line[:end], line) for end in range(1, len(text) + 1) if end < len(line)}
    ends = [end for end, length in shared.items() if length >= ngram][-OCCURRENCES:]
    if not ends:
        return []
    best = max(ends, key=lambda end: (min(shared[end], REACH), end))
    for _ in range(count):
        line.append(line[best])
        best += 1
    return line[-count:] if count else []
