"""What guards know of a tokenizer: the bytes of its tokens, the tags, and lines as tokens. Once per process."""

import codecs
from functools import cache

from transformers.convert_slow_tokenizer import bytes_to_unicode

from sglang_step35.guards.settings import GuardError
from sglang_step35.guards.thinking import Tags
from sglang_step35.parsers.reasoning import THINK, THINK_END

CALL, CALL_END = "<tool_call>", "</tool_call>"
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
_Decoder = codecs.getincrementaldecoder("utf-8")
READ = 8192  # tokens at the end of a message that say which scripts it uses


class Vocabulary:
    """A byte-level BPE tokenizer with ids below `size`."""

    def __init__(self, tokenizer, size: int):
        self.tokenizer = tokenizer
        self.size = size
        self._bytes = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self._added = tokenizer.added_tokens_decoder
        self._count = len(tokenizer)
        self._known: dict[int, bytes] = {}

    def token(self, text: str) -> int | None:
        """The id of a tag, None where the tokenizer has none for it."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def tags(self) -> Tags:
        """Raises GuardError where `<think>` is no token."""
        start, end = self.token(THINK), self.token(THINK_END)
        if start is None or end is None:
            raise GuardError(f"guards: this tokenizer has no tokens for {THINK} and {THINK_END}")
        return Tags(start, end, self.token(CALL), self.token(CALL_END))

    def leads_out(self, line: str) -> tuple[int, ...]:
        """A line on its own and `</think>`, as tokens; without a line the tag alone."""
        text = f"\n\n{line}\n{THINK_END}" if line else THINK_END
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text, nothing for a control token."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def is_tag(self, token: int) -> bool:
        """Whether it was added to the tokenizer: a control token or a tag."""
        return token in self._added

    def _read(self, token: int) -> bytes:
        if token in self._added:
            added = self._added[token]
            return b"" if added.special else added.content.encode()
        letters = self.tokenizer.convert_ids_to_tokens(token) if token < self._count else None
        return bytes(map(self._bytes.__getitem__, letters or ""))

    def last_user_message(self, prompt: list[int]) -> str:
        """Its text, with its role, in a prompt of the chat template; of any other prompt all. READ tokens at most."""
        turn, end = self.token(TURN), self.token(TURN_END)
        for start in range(len(prompt) - 1, -1, -1):
            if prompt[start] == turn:
                stop = prompt.index(end, start) if end in prompt[start:] else len(prompt)
                role = self.tokenizer.decode(list(prompt[start + 1 : start + 9])).partition("\n")[0]
                if role == "user":
                    return self.tokenizer.decode(list(prompt[start + 1 : stop])[-READ:])
        return self.tokenizer.decode(list(prompt[-READ:]))


@cache
def vocabulary_of(tokenizer, size: int) -> Vocabulary:
    """The one of this process."""
    return Vocabulary(tokenizer, size)


def spell(text: bytes) -> tuple[str, bytes]:
    """The characters that bytes of UTF-8 spell, without invalid ones, and the beginning of one that they end with."""
    decoder = _Decoder("ignore")
    return decoder.decode(text), decoder.getstate()[0]
