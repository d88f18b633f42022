"""A plain parser of whole outputs, independent of the package's, and hand-written cases for it.

It looks at the complete text position by position; there is no streaming, no shared pattern
and no shared schema code. `test_parsers.py` compares the package against it.
"""

import json
import re
from dataclasses import dataclass, field

import pytest

TOOLS = {
    "write": {"path": "string", "code": "string", "count": "integer"},
    "ask": {
        "ratio": "number",
        "deep": "boolean",
        "where": "object",
        "tags": "array",
        "note": ["string", "null"],
    },
    "now": {},
}
BLANK = " \t\r\n"
SP, NAME = f"[{BLANK}]", f"[^{BLANK}<>]+"


@dataclass
class Call:
    """arguments: JSON text, cut open where the output ended within the call."""

    name: str
    arguments: str = ""


@dataclass
class Turn:
    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)


def parse(text: str, calls_active: bool = True) -> Turn:
    """The turn a whole output stands for."""
    reasoning, answer = split(text, calls_active)
    turn = Turn(reasoning, answer)
    if calls_active:
        turn.content = ""
        extract(answer, turn)
    return turn


def split(text: str, calls_active: bool) -> tuple[str, str]:
    while text.startswith("<think>"):
        text = text[len("<think>") :].removeprefix("\n")
    for at in range(len(text)):
        if text.startswith("</think>", at):
            answer = text[at + len("</think>") :]
            return text[:at].removesuffix("\n"), answer.removeprefix("\n")
        if calls_active and re.match(rf"<tool_call>{SP}*<function(=|{SP})", text[at:]):
            return text[:at].removesuffix("\n"), text[at:]
    return text, ""


def extract(text: str, turn: Turn) -> None:
    """Walk the answer: stretches of text, and calls with what they contain."""
    start = at = 0
    while at < len(text):
        opened = opens(text, at)
        if opened is None:
            at += 1
            continue
        add_text(text[start:at], turn, last=False)
        at = read_calls(text, *opened, turn)
        start = at
    add_text(text[start:], turn, last=True)


def opens(text: str, at: int) -> tuple[str, int] | None:
    """(function name, position behind the tag) when a call starts at this position."""
    rest = text[at:]
    if match := re.match(rf"<tool_call>{SP}*<function(=|{SP}+)({NAME}){SP}*>", rest):
        if match[1] == "=" or match[2] in TOOLS:
            return match[2], at + match.end()
    if match := re.match(rf"<function=({NAME})>(?={SP}*(<parameter=|</function>))", rest):
        if match[1] in TOOLS:
            return match[1], at + match.end()
    return None


def add_text(stretch: str, turn: Turn, last: bool) -> None:
    """Blank stretches beside a call are layout, as is a </think> that came after it."""
    if turn.calls:
        if re.fullmatch(rf"{SP}*(</think>{SP}*)?", stretch):
            return
        stretch = re.sub(rf"\A{SP}*</think>\n?", "", stretch)
    elif not stretch.strip(BLANK) and not last:
        return
    turn.content += stretch


def read_calls(text: str, name: str, at: int, turn: Turn) -> int:
    """The call at this position and further ones in the same wrapper; the position behind."""
    while True:
        call = Call(name)
        turn.calls.append(call)
        at, ended_by = read_parameters(text, at, call)
        if ended_by != "</function>":
            return at
        rest = text[at:]
        if match := re.match(rf"{SP}*</tool_call>", rest):
            return at + match.end()
        match = re.match(rf"{SP}*<function=({NAME}){SP}*>", rest)
        if not match:
            # An output cut within the wrapper's end tag.
            return len(text) if is_cut(rest.lstrip(BLANK)) else at
        name, at = match[1], at + match.end()


def is_cut(rest: str) -> bool:
    cut_function = re.fullmatch(rf"<function=({NAME})?{SP}*", rest)
    return "</tool_call>".startswith(rest) or "<function=".startswith(rest) or bool(cut_function)


def read_parameters(text: str, at: int, call: Call) -> tuple[int, str]:
    values: dict[str, object] = {}
    open_text = None
    while at < len(text):
        match = re.match(r"<parameter=([^<>\n]+)>|</function>|</tool_call>", text[at:])
        if not match:
            at += 1
            continue
        at += match.end()
        if not match[1]:
            call.arguments = json.dumps(values, ensure_ascii=False)
            return at, match[0]
        key = match[1].strip()
        at += text[at : at + 1] == "\n"
        end, behind = value_end(text, at, set(TOOLS.get(call.name, {})) - {*values, key})
        kind = TOOLS.get(call.name, {}).get(key, "string")
        if key in values:
            pass
        elif behind is not None:
            values[key] = convert(text[at:end], kind)
        elif kind == "string":
            open_text = (key, text[at:end])
        at = len(text) if behind is None else behind
    call.arguments = json.dumps(values, ensure_ascii=False)[:-1]
    if open_text is not None:
        both = json.dumps({**values, open_text[0]: open_text[1]}, ensure_ascii=False)
        call.arguments = both[: -len('"}')]
    return at, ""


def value_end(text: str, at: int, missing: set[str]) -> tuple[int, int | None]:
    """(end of the value, position behind its end tag); behind is None when the text ends first."""
    for end in range(at, len(text)):
        rest = text[end:].removeprefix("\n")
        skipped = len(text) - end - len(rest)
        if rest.startswith("</parameter>"):
            after = rest[len("</parameter>") :].lstrip(BLANK)
            if after.startswith(("<parameter=", "</function>", "</tool_call>")):
                return end, len(text) - len(after)
        if rest.startswith("</function>"):
            if rest[len("</function>") :].lstrip(BLANK).startswith("</tool_call>"):
                return end, end + skipped
        if skipped and any(rest.startswith(f"<parameter={key}>") for key in missing):
            return end, end + skipped
    return cut_value_end(text, at, missing), None


def cut_value_end(text: str, at: int, missing: set[str]) -> int:
    """Where an unfinished value ends: before what may be the beginning of its end tag."""
    for end in range(at, len(text)):
        rest = text[end:]
        bare = rest.removeprefix("\n")
        cut = any(tail.startswith(bare) for tail in ("</parameter>", "</function>"))
        for tail, followers in (
            ("</parameter>", ("<parameter=", "</function>", "</tool_call>")),
            ("</function>", ("</tool_call>",)),
        ):
            if bare.startswith(tail):
                after = bare[len(tail) :].lstrip(BLANK)
                cut |= any(follower.startswith(after) for follower in followers)
        if rest != bare:
            cut |= any(f"<parameter={key}>".startswith(bare) for key in missing)
        if cut:
            return end
    return len(text)


def convert(text: str, kind) -> object:
    if kind == "string":
        return text
    stripped = text.strip()
    if stripped in ("null", "None"):
        return None
    if kind == ["string", "null"]:
        return text
    if kind == "boolean" and stripped.lower() in ("true", "false"):
        return stripped.lower() == "true"
    expected = {"integer": int, "number": (int, float), "object": (dict, list)}
    try:
        value = json.loads(stripped)
    except ValueError:
        return text
    fits = isinstance(value, expected.get(kind, (dict, list))) and not isinstance(value, bool)
    return value if fits and kind != "boolean" else text


def render(name: str, values: dict[str, str]) -> str:
    """A call as the chat template writes it."""
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


NOW = render("now", {})
WRITE = render("write", {"path": "a"})
W = '{"path": "a"}'
TAGS = "\n</parameter x\n</parameter>, <parameter=z>\n</function>"
UNFINISHED = "</think><tool_call>\n<function=write>\n"

# name: (output, reasoning, content, [(function, arguments), ...])
CASES = {
    "only the tag": ("</think>", "", "", []),
    "nothing": ("", "", "", []),
    "newlines belong to the format": ("a\n</think>\nb", "a", "b", []),
    "one newline each": ("\na\n\n</think>\n\nb\n", "\na\n", "\nb\n", []),
    "never closed": ("a\n</thi", "a\n</thi", "", []),
    "tags behind the first end": ("a</think>b<think>c</think>d", "a", "b<think>c</think>d", []),
    "think in reasoning": ("say <think> a</think>b", "say <think> a", "b", []),
    "own think tag": ("<think>\na\n</think>\nb", "a", "b", []),
    "fused calls": (f"</think>{NOW}{WRITE}", "", "", [("now", "{}"), ("write", W)]),
    "blank between": (f"a</think>\n\n{NOW}\n{NOW}\n", "a", "", [("now", "{}")] * 2),
    "text around": (
        f"</think>before\n{NOW}\nbetween {WRITE} after",
        "",
        "before\n\nbetween  after",
        [("now", "{}"), ("write", W)],
    ),
    "call ends reasoning": (f"plan\n{NOW}\n</think>\nlate", "plan", "late", [("now", "{}")]),
    "unknown tool": (f"</think>{render('x.y/z', {'k': '1'})}", "", "", [("x.y/z", '{"k": "1"}')]),
    "mentions": (
        "</think>Use the <tool_call> tag, <function=now> and a < b <",
        "",
        "Use the <tool_call> tag, <function=now> and a < b <",
        [],
    ),
    "typed": (
        "</think>"
        + render("write", {"path": "007", "count": "-3"})
        + render("ask", {"ratio": "0.5", "deep": "True", "where": '{"a": [1, "<"]}', "note": "5"}),
        "",
        "",
        [
            ("write", '{"path": "007", "count": -3}'),
            ("ask", '{"ratio": 0.5, "deep": true, "where": {"a": [1, "<"]}, "note": "5"}'),
        ],
    ),
    "null": (
        f"</think>{render('write', {'path': 'null'})}{render('ask', {'note': 'null'})}",
        "",
        "",
        [("write", '{"path": "null"}'), ("ask", '{"note": null}')],
    ),
    "tags in a value": (
        "</think>" + render("write", {"code": TAGS}),
        "",
        "",
        [("write", json.dumps({"code": TAGS}))],
    ),
    "slips": (
        "</think><tool_call><function write><parameter=path>a</parameter></function></tool_call>"
        "<function=write>\n<parameter=path>\na\n<parameter=count>\n1\n</function>\n</tool_call>",
        "",
        "",
        [("write", W), ("write", '{"path": "a", "count": 1}')],
    ),
    "repeated": (
        UNFINISHED + "<parameter=path>\na</parameter><parameter=path>b</parameter></function>",
        "",
        "",
        [("write", W)],
    ),
    "cut name": ("</think><tool_call>\n<function=wri", "", "<tool_call>\n<function=wri", []),
    "cut before": (UNFINISHED, "", "", [("write", "{")]),
    "cut key": (UNFINISHED + "<parameter=pa", "", "", [("write", "{")]),
    "cut text": (UNFINISHED + "<parameter=path>\nrm /", "", "", [("write", '{"path": "rm /')]),
    "cut number": (UNFINISHED + "<parameter=count>\n12", "", "", [("write", "{")]),
    "cut end tag": (UNFINISHED + "<parameter=path>\na\n</para", "", "", [("write", '{"path": "a')]),
    "cut behind": (UNFINISHED + "<parameter=path>\na\n</parameter>\n", "", "", [("write", W[:-2])]),
    "cut wrapper": (UNFINISHED + "</function>\n</tool", "", "", [("write", "{}")]),
}


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    text, reasoning, content, calls = CASES[name]
    assert parse(text) == Turn(reasoning, content, [Call(*call) for call in calls])
