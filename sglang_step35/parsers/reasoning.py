"""Push parser that splits Step-3.5's output into reasoning and answer. Pure: no SGLang import.

The prompt ends with `<think>\\n`, so the output starts within the reasoning. The chat template
renders a turn as `<think>\\n` + reasoning + `\\n</think>\\n` + answer: the newlines beside the
tags belong to the format, and dropping them makes a turn sent back render as it was generated.
"""

import regex

THINK, THINK_END = "<think>", "</think>"

_END = regex.compile(r"\n?</think>")
# The model sometimes calls a tool without closing its reasoning first.
_END_OR_CALL = regex.compile(r"\n?(?:</think>|(?=<tool_call>[ \t\r\n]*<function[= \t\r\n]))")


class ReasoningSplitter:
    """Turns chunks into (reasoning, answer) pairs, the same however the text is cut.

    Only the first end of reasoning counts; a later `<think>` or `</think>` is answer text.
    """

    def __init__(self, in_reasoning: bool = True, ends_at_call: bool = False, answer_start: bool = False):
        """ends_at_call: a tool call ends the reasoning, for when something parses the calls.

        answer_start: with in_reasoning False, the prompt ended right behind `</think>`.
        """
        self._buffer = ""
        self._end = _END_OR_CALL if ends_at_call else _END
        if in_reasoning:
            self._state = self._start
        else:
            self._state = self._answer_start if answer_start else self._answer

    @property
    def in_reasoning(self) -> bool:
        return self._state in (self._start, self._start_line, self._reasoning)

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) that are certain after one more chunk."""
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> tuple[str, str]:
        """What was held back, once no more text can come."""
        return self._run(final=True)

    def _run(self, final: bool) -> tuple[str, str]:
        self._parts = {"reasoning": "", "answer": ""}
        while (following := self._state(final)) is not None:
            self._state = following
        return self._parts["reasoning"], self._parts["answer"]

    # States: each consumes what it can of the buffer and returns the next state, or None to wait.

    def _start(self, final: bool):
        """Drop a <think> the model wrote itself, as it does where the template lacks it."""
        if self._buffer.startswith(THINK):
            self._buffer = self._buffer[len(THINK) :]
            return self._start_line
        waits = THINK.startswith(self._buffer) and not final
        return None if waits else self._reasoning

    def _start_line(self, final: bool):
        return self._drop_newline(final, self._start)

    def _reasoning(self, final: bool):
        match = self._end.search(self._buffer, partial=not final)
        self._emit("reasoning", match.start() if match else len(self._buffer))
        if match is None or match.partial:
            return None
        ended_by_tag = THINK_END in match[0]
        self._buffer = self._buffer[match.end() - match.start() :]
        return self._answer_start if ended_by_tag else self._answer

    def _answer_start(self, final: bool):
        return self._drop_newline(final, self._answer)

    def _answer(self, final: bool):
        self._emit("answer", len(self._buffer))
        return None

    def _drop_newline(self, final: bool, following):
        if not self._buffer and not final:
            return None
        self._buffer = self._buffer.removeprefix("\n")
        return following

    def _emit(self, part: str, length: int) -> None:
        self._parts[part] += self._buffer[:length]
        self._buffer = self._buffer[length:]
