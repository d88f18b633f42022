"""Push parser for Step-3.5's tool calls. Pure: no SGLang import.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Values are not escaped, and a chunk may hold any number of tags or end within one. Every
decision is therefore made by a pattern that is searched with `partial`: text that may still
become a tag waits for the next chunk, all other text is passed on at once. What comes out
depends on the whole text only, never on how it was cut.
"""

from dataclasses import dataclass
from functools import lru_cache

import regex

from sglang_step35.parsers.values import Kinds, dump, is_text, read_value

_BLANK = r"[ \t\r\n]"  # whitespace of the format; rarer kinds are content
_NAME = r"[^ \t\r\n<>]+"
# Inside a call: the tags that may follow a parameter. Anything else between tags is ignored.
_BODY = regex.compile(r"<parameter=(?P<key>[^<>\n]+)>|(?P<function></function>)|</tool_call>")
# After </function>: the wrapper's end, or a further function in the same wrapper.
_AFTER = regex.compile(rf"{_BLANK}*(?:</tool_call>|<function=(?P<name>{_NAME}){_BLANK}*>)")
# Text beside calls that is layout, not content. A </think> comes late when the call ended the
# reasoning before the model did.
_LAYOUT = regex.compile(rf"{_BLANK}*")
_LAYOUT_AFTER_CALL = regex.compile(rf"{_BLANK}*(?:</think>{_BLANK}*)?")
_LATE_THINK_END = regex.compile(rf"\A{_BLANK}*</think>\n?")


@dataclass(frozen=True)
class Event:
    """kind: "text" | "call" (text is its name) | "arguments" (text is a piece of JSON)."""

    kind: str
    text: str


@dataclass
class _Parameter:
    """The parameter whose value is being read.

    prefix: JSON up to the value. streams: the value is text and goes out as it comes, else it
    is read as a whole. searched: how much of the buffer holds no end of the value.
    """

    prefix: str
    kinds: Kinds
    repeated: bool
    streams: bool
    end: regex.Pattern
    searched: int = 0


class ToolCallScanner:
    """Turns chunks of an answer into events; `finish` tells what the end of the text decides.

    A call's first arguments event is "{"; the events of a finished call concatenate to a JSON
    object. A call the text leaves unfinished keeps its JSON open: closing it would let a
    client run a truncated command.
    """

    def __init__(self, tools: dict[str, dict[str, Kinds]]):
        """tools: for each declared tool the kinds of its parameters, see `argument_kinds`."""
        self._tools = tools
        self._opening = _opening_pattern(tuple(tools))
        self._buffer = ""
        self._state = self._outside
        self._events: list[Event] = []
        self._calls = 0
        self._kinds: dict[str, Kinds] = {}  # of the current call's parameters
        self._keys: set[str] = set()  # parameters the current call has given
        self._parameter: _Parameter | None = None
        # The current stretch of text while it is nothing but layout; None once it is content.
        self._layout: str | None = ""
        self.in_call = False

    def feed(self, text: str) -> list[Event]:
        """Events that are certain after one more chunk."""
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> list[Event]:
        """Remaining events once no more text can come; `in_call` tells of an unfinished call."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[Event]:
        self._events = []
        while (following := self._state(final)) is not None:
            self._state = following
        return _merged(self._events)

    # States: each consumes what it can of the buffer and returns the next state, or None to wait.

    def _outside(self, final: bool):
        match = self._opening.search(self._buffer, partial=not final)
        self._text(self._take(match.start() if match else len(self._buffer)))
        if match and not match.partial:
            self._take(match.end() - match.start())
            return self._enter(match["name"] or match["declared"])
        if final:
            self._end_stretch(before_call=False)
        return None

    def _enter(self, name: str):
        self._end_stretch(before_call=True)
        self._calls += 1
        self.in_call = True
        self._kinds = self._tools.get(name, {})
        self._keys = set()
        self._emit("call", name)
        self._emit("arguments", "{")
        return self._body

    def _body(self, final: bool):
        match = _BODY.search(self._buffer, partial=not final)
        self._take(match.start() if match else len(self._buffer))
        if match is None or match.partial:
            return None
        self._take(match.end() - match.start())
        if match["key"]:
            return self._enter_value(match["key"].strip())
        self._emit("arguments", "}")
        self.in_call = False
        return self._after if match["function"] else self._outside

    def _enter_value(self, key: str):
        # What was streamed cannot be taken back: of a repeated parameter the first one stands.
        repeated = key in self._keys
        prefix = (", " if self._keys else "") + dump(key) + ": "
        self._keys.add(key)
        kinds = self._kinds.get(key, ())
        missing = tuple(name for name in self._kinds if name not in self._keys)
        streams = is_text(kinds) and not repeated
        end = _value_end_pattern(missing)
        self._parameter = _Parameter(prefix, kinds, repeated, streams, end)
        if streams:
            self._emit("arguments", prefix + '"')
        return self._value_start

    def _value_start(self, final: bool):
        if not self._buffer and not final:
            return None
        if self._buffer.startswith("\n"):
            self._take(1)
        return self._value

    def _value(self, final: bool):
        parameter = self._parameter
        assert parameter is not None  # `_parameter_start` leads here
        # Partial also at the end: a value cut within its closing tag is given without it.
        match = parameter.end.search(self._buffer, parameter.searched, partial=True)
        closed = match is not None and not match.partial
        length = match.start() if match else len(self._buffer)
        if parameter.streams:
            self._emit("arguments", _escaped(self._take(length)) + ('"' if closed else ""))
        elif not closed:
            parameter.searched = length
        else:
            value = self._take(length)
            if not parameter.repeated:
                self._emit("arguments", parameter.prefix + dump(read_value(value, parameter.kinds)))
        if not closed:
            return None
        self._take(match.end() - match.start())
        return self._body

    def _after(self, final: bool):
        match = _AFTER.match(self._buffer, partial=True)
        if match is None:
            return self._outside
        if match.partial:  # also at the end: what a cut left of the wrapper's end tag is no text
            return None
        self._take(match.end())
        return self._enter(match["name"]) if match["name"] else self._outside

    # Buffer and events.

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _emit(self, kind: str, text: str) -> None:
        if text:
            self._events.append(Event(kind, text))

    def _text(self, piece: str) -> None:
        """Emit text outside calls, but hold a stretch back while it is only layout."""
        if self._layout is None:
            self._emit("text", piece)
            return
        self._layout += piece
        if not self._layout_pattern().fullmatch(self._layout, partial=True):
            self._emit_layout()

    def _end_stretch(self, before_call: bool) -> None:
        """Drop a stretch that was layout beside a call, emit one that proves to be content."""
        beside_call = before_call or self._calls > 0
        if self._layout and not (beside_call and self._layout_pattern().fullmatch(self._layout)):
            self._emit_layout()
        self._layout = ""

    def _layout_pattern(self):
        return _LAYOUT_AFTER_CALL if self._calls else _LAYOUT

    def _emit_layout(self) -> None:
        text, self._layout = self._layout or "", None
        self._emit("text", _LATE_THINK_END.sub("", text) if self._calls else text)


def _merged(events: list[Event]) -> list[Event]:
    """One event for neighbours of the same kind: each event costs the client a message."""
    merged: list[Event] = []
    for event in events:
        if merged and merged[-1].kind == event.kind != "call":
            event = Event(event.kind, merged.pop().text + event.text)
        merged.append(event)
    return merged


def _escaped(text: str) -> str:
    """The inside of a JSON string; escapes are per character, so pieces concatenate."""
    return dump(text)[1:-1]


def _alternatives(names: tuple[str, ...]) -> str:
    return "|".join(map(regex.escape, names)) or r"(?!)"


@lru_cache(maxsize=256)
def _opening_pattern(declared: tuple[str, ...]):
    """Where a call starts. A <tool_call> in prose is no call: a function must follow.

    Names of declared tools are enough evidence for two slips of the model: a blank instead of
    the "=", and a missing <tool_call> when a parameter or the function's end follows.
    """
    names = _alternatives(declared)
    return regex.compile(
        rf"<tool_call>{_BLANK}*<function"
        rf"(?:=(?P<name>{_NAME})|{_BLANK}+(?P<declared>{names})){_BLANK}*>"
        rf"|<function=(?P<declared>{names})>(?={_BLANK}*(?:<parameter=|</function>))"
    )


@lru_cache(maxsize=256)
def _value_end_pattern(missing: tuple[str, ...]):
    """Where a parameter's value ends, with the one newline that belongs to the format.

    Values hold code, and code may hold tags, so a tag counts only with what the format lets
    follow it. A forgotten </parameter> shows when function and wrapper end, or when a line
    starts a parameter (of `missing`) that the tool declares and the call has not given yet.
    """
    return regex.compile(
        rf"\n?</parameter>{_BLANK}*(?=<parameter=|</function>|</tool_call>)"
        rf"|\n?(?=</function>{_BLANK}*</tool_call>)"
        rf"|\n(?=<parameter=(?:{_alternatives(missing)})>)"
    )
