"""The step3p5 parsers through SGLang's own interfaces: however a stream is cut, one result."""

import functools
import json
from itertools import cycle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser

from sglang_step35.parsers import register_parsers
from tests.parsers import test_reference as reference
from tests.parsers.test_reference import CASES, Call, Turn, render

register_parsers()
many = functools.partial(settings, deadline=None, max_examples=300)


def tool(name: str, kinds: dict) -> Tool:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    schema = {"type": "object", "properties": properties}
    return Tool(type="function", function=Function(name=name, parameters=schema))


TOOLS = [tool(name, kinds) for name, kinds in reference.TOOLS.items()]


def whole(text: str, calls_active: bool = True) -> Turn:
    """As serving_chat parses a response that is not streamed."""
    reasoning = ReasoningParser("step3p5", stream_reasoning=False, tool_call_parser_active=calls_active)
    turn = Turn(*reasoning.parse_non_stream(text))
    parser = FunctionCallParser(TOOLS, "step3p5")
    if calls_active and parser.has_tool_call(turn.content):
        turn.content, items = parser.parse_non_stream(turn.content)
        turn.calls = [Call(item.name, item.parameters) for item in items]
    return turn


def streamed(text: str, sizes: list[int], calls_active: bool = True, **options) -> Turn:
    """As serving_chat parses a stream, with the contract of the deltas checked."""
    reasoning = ReasoningParser("step3p5", tool_call_parser_active=calls_active, **options)
    parser = FunctionCallParser(TOOLS, "step3p5")
    turn = Turn()
    chunks = list(cut(text, sizes))
    for index, chunk in enumerate(chunks):
        flush = index == len(chunks) - 1
        parts = [reasoning.parse_stream_chunk(chunk)]
        if flush:
            parts.append(reasoning.parse_stream_end())
        turn.reasoning += "".join(part[0] or "" for part in parts)
        delta = "".join(part[1] or "" for part in parts)
        if calls_active:
            take(turn, *parser.parse_stream_chunk(delta), ordered=not flush)
            if flush:
                take(turn, *parser.parse_stream_end(), ordered=False)
        else:
            turn.content += delta
    check_bookkeeping(parser.detector, turn)
    return turn


def cut(text: str, sizes: list[int]):
    """Chunks of the given lengths in turn; the last may be empty, as when only EOS is left."""
    at, lengths = 0, cycle(sizes)
    while at < len(text):
        length = next(lengths)
        yield text[at : at + length]
        at += length
    if at == len(text):
        yield ""


def take(turn: Turn, text: str, items: list, ordered: bool) -> None:
    """Add one increment: text first, then calls, which is the order the server sends them."""
    if ordered and text and items:
        assert items[0].name is not None, "text would end the block of an unfinished call"
    turn.content += text
    for item in items:
        if item.name is not None:
            assert item.parameters == ""
            assert item.tool_index == len(turn.calls), "indices count up from 0"
            turn.calls.append(Call(item.name))
        else:
            assert item.parameters
            assert item.tool_index == len(turn.calls) - 1
            turn.calls[-1].arguments += item.parameters


def check_bookkeeping(detector, turn: Turn) -> None:
    """What serving_chat's _check_for_unstreamed_tool_args and finish reason look at."""
    assert detector.streamed_args_for_tool == [call.arguments for call in turn.calls]
    recorded = [Call(entry["name"], entry["arguments"]) for entry in detector.prev_tool_call_arr]
    assert recorded == turn.calls
    for index, call in enumerate(turn.calls):
        incomplete = index in detector.incomplete_tool_call_indices
        assert incomplete == (not is_object(call.arguments))


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


WORDS = ["a", "x = 1", " ", "\n", "\n\n", "\r\n", "<", "</", ">", "{", '"', "\\"]
WORDS += ["é", "e\u0301", "\U0001f469\u200d\U0001f680", "工具", "\u2028", "\x1f"]
TAGS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "</tool_call><tool_call>",
    "<function=now>",
    "<function=write>",
    "<function ask>",
    "<function=un.known>",
    "</function>",
    "<parameter=path>",
    "<parameter=code>",
    "<parameter=count>",
    "<parameter=deep>",
    "<parameter=note>",
    "<parameter=x>",
    "</parameter>",
    "</parameter",
    "</parameters>",
    "<tool_call>\n<function=write>\n<parameter=path>\n",
    "<tool_call>\n<function=ask>\n<parameter=where>\n",
    "\n</parameter>\n",
    "\n</function>\n</tool_call>",
]
VALUES = ["12", "-1", "1.5", "true", "False", "null", "None", '{"a": {"b": "</x>"}}', '["<", 1]']
PIECES = st.sampled_from(WORDS + TAGS + VALUES) | st.sampled_from(TAGS).flatmap(
    lambda tag: st.integers(1, len(tag)).map(lambda end: tag[:end])
)
SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)
SOUP = st.lists(PIECES, max_size=40)
CALL_PIECES = st.lists(
    st.tuples(st.sampled_from(["path", "code", "count", "deep", "note", "x"]), PIECES), max_size=3
).map(
    lambda values: (
        ["<tool_call>", "\n", "<function=write>", "\n"]
        + [part for k, v in values for part in (f"<parameter={k}>", "\n", v, "\n", "</parameter>")]
        + ["\n", "</function>", "\n", "</tool_call>"]
    )
)


@st.composite
def damaged(draw) -> list[str]:
    """Well-formed calls with pieces lost, added or cut off."""
    pieces = [piece for call in draw(st.lists(CALL_PIECES, max_size=3)) for piece in call]
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(pieces)))
        pieces[at : at + draw(st.integers(0, 2))] = draw(st.lists(PIECES, max_size=2))
    return pieces


OUTPUTS = st.one_of(SOUP, damaged()).map("".join)


@many()
@example(f"{reference.NOW}<{reference.NOW}\n</thi", False, [1], True)
@given(text=OUTPUTS, thinks=st.booleans(), sizes=SIZES, active=st.booleans())
def test_any_output_any_cut(text, thinks, sizes, active):
    text = text if thinks else "</think>" + text
    expected = reference.parse(text, active)
    assert whole(text, active) == expected
    assert streamed(text, sizes, active) == expected
    assert streamed(text, [1], active) == expected
    assert streamed(text, [len(text) + 1], active) == expected
    assert streamed(text, sizes, active, stream_reasoning=False) == expected


LOOKALIKES = ["</parameter", "</parameter> x", "<parameter=zz>", "</function> x", "<tool_call>"]
CODE = st.lists(st.sampled_from(WORDS + VALUES + LOOKALIKES), max_size=12).map("|".join)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False, width=32)
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"))
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.one_of(
    st.tuples(
        st.just("write"),
        st.fixed_dictionaries({}, optional={"path": PLAIN, "code": CODE, "count": st.integers()}),
    ),
    st.tuples(
        st.just("ask"),
        st.fixed_dictionaries(
            {},
            optional={
                "ratio": NUMBERS,
                "deep": st.booleans(),
                "where": st.dictionaries(PLAIN, NESTED, max_size=3),
                "tags": st.lists(NESTED, max_size=3),
                "note": st.none() | PLAIN.filter(lambda text: text not in ("null", "None")),
            },
        ),
    ),
    st.tuples(st.just("now"), st.just({})),
    st.tuples(st.just("un.known"), st.dictionaries(st.sampled_from("kmn"), PLAIN, max_size=2)),
)


@many(max_examples=150)
@given(
    reasoning=PLAIN,
    content=PLAIN,
    calls=st.lists(CALLS, max_size=4),
    sizes=SIZES,
    gap=st.booleans(),
)
def test_a_turn_comes_back(reasoning, content, calls, sizes, gap):
    """What the template renders is parsed to what was rendered."""
    text = f"{reasoning}\n</think>\n{content}"
    rendered = []
    for name, values in calls:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
        rendered.append(render(name, texts))
    text += ("\n" if gap else "").join(rendered)
    if calls and not content.strip(reference.BLANK):
        content = ""
    expected = [Call(name, json.dumps(values, ensure_ascii=False)) for name, values in calls]
    for turn in (whole(text), streamed(text, sizes), streamed(text, [4]), streamed(text, [1])):
        assert turn == Turn(reasoning, content, expected)


@many(max_examples=60)
@given(data=st.data(), calls=st.lists(CALLS, min_size=1, max_size=3), sizes=SIZES)
def test_cut_at_max_tokens(data, calls, sizes):
    """Of a cut output the arguments are the beginning of the whole ones, and the last is open."""
    text = "</think>" + "".join(
        render(name, {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()})
        for name, values in calls
    )
    end = data.draw(st.integers(0, len(text) - 1))
    short = streamed(text[:end], sizes)
    assert short == whole(text[:end]) == reference.parse(text[:end])
    for cut_call, call in zip(short.calls, whole(text).calls, strict=False):
        assert call.name == cut_call.name
        assert call.arguments.startswith(cut_call.arguments)


@pytest.mark.parametrize("name", CASES)
def test_cases_at_every_size(name):
    text, reasoning, content, calls = CASES[name]
    expected = Turn(reasoning, content, [Call(*call) for call in calls])
    assert whole(text) == expected
    for size in range(1, len(text) + 2):
        assert streamed(text, [size]) == expected


@pytest.mark.parametrize("name", CASES)
def test_cases_at_every_single_cut(name):
    text, reasoning, content, calls = CASES[name]
    expected = Turn(reasoning, content, [Call(*call) for call in calls])
    for at in range(1, len(text)):
        assert streamed(text, [at, len(text)]) == expected
