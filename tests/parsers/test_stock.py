"""What stock's step3p5 detectors get wrong, next to what ours make of it.

This keeps the docstrings of `detectors` true: when one of these tests fails on a new SGLang,
stock has changed, and a reason to replace its detector may be gone.
"""

import pytest
from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.qwen3_coder_detector import Qwen3CoderDetector
from sglang.srt.parser.reasoning_parser import DeepSeekR1Detector

from sglang_step35.parsers.detectors import Step35ToolCallDetector
from tests.parsers.test_reference import render

KINDS = {"s": "string", "n": "number", "i": "integer", "b": "boolean", "o": "object"}
PROPERTIES = {
    **{key: {"type": kind} for key, kind in KINDS.items()},
    "r": {"$ref": "#/$defs/Item"},
    "u": {"anyOf": [{"type": "string"}, {"type": "array"}]},
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "$defs": {"Item": {"type": "object"}}}
TOOLS = [
    Tool(type="function", function=Function(name="f", parameters=SCHEMA)),
    Tool(type="function", function=Function(name="g", parameters=None)),
]
F = "<tool_call>\n<function=f>\n"
G = render("g", {})


def f(**values: str) -> str:
    return render("f", values)


def whole(detector, text: str) -> tuple[str, list]:
    result = detector.detect_and_parse(text, TOOLS)
    return result.normal_text, [(call.name, call.parameters) for call in result.calls]


def streamed(detector, text: str, size: int = 1) -> tuple[str, list]:
    results = [detector.parse_streaming_increment(text[at : at + size], TOOLS) for at in range(0, len(text), size)]
    results.append(detector.finish(TOOLS))
    calls = {}
    for item in (call for result in results for call in result.calls):
        name, arguments = calls.get(item.tool_index, ("", ""))
        calls[item.tool_index] = (name + (item.name or ""), arguments + item.parameters)
    return "".join(result.normal_text for result in results), list(calls.values())


# output: (stock whole, stock streamed, ours); None where stock raises.
TOOL_CALL_FAILURES = {
    G + "\nafter": (("", [("g", "{}")]), ("\nafter", [("g", "{}")]), ("\nafter", [("g", "{}")])),
    G + "\n" + G: (("", [("g", "{}")] * 2), ("\n", [("g", "{}")] * 2), ("", [("g", "{}")] * 2)),
    "x <": (("x <", []), ("x ", []), ("x <", [])),
    "the <tool_call> tag, then": (
        ("the ", []),
        ("the ", []),
        ("the <tool_call> tag, then", []),
    ),
    "write <function=f> here": (
        ("write <function=f> here", []),
        ("write  here", [("f", "")]),
        ("write <function=f> here", []),
    ),
    f(s="a </tool_call> b"): (
        ("", [("f", '{"s": "a "}')]),
        ("", [("f", '{"s": "a </tool_call> b"}')]),
        ("", [("f", '{"s": "a </tool_call> b"}')]),
    ),
    f(s="a </parameter> b"): (
        ("", [("f", '{"s": "a "}')]),
        ("", [("f", '{"s": "a "}')]),
        ("", [("f", '{"s": "a </parameter> b"}')]),
    ),
    f(s='x = "<parameter=n>"'): (
        ("", [("f", '{"s": "x = \\"", "n": "\\""}')]),
        ("", [("f", '{"s": "x = \\"", "n": "\\""}')]),
        ("", [("f", '{"s": "x = \\"<parameter=n>\\""}')]),
    ),
    f(s="a </function> b"): (
        ("", [("f", '{"s": "a "}')]),
        ("", [("f", '{"s": "a "}}')]),
        ("", [("f", '{"s": "a </function> b"}')]),
    ),
    F + "<parameter=s>1</parameter><parameter=s>2</parameter></function></tool_call>": (
        ("", [("f", '{"s": "2"}')]),
        ("", [("f", '{"s": "1", "s": "2"}')]),
        ("", [("f", '{"s": "1"}')]),
    ),
    F + "<parameter=s>\nrm -rf /": (
        ("", [("f", '{"s": "rm -rf /"}')]),
        ("", [("f", "")]),
        ("", [("f", '{"s": "rm -rf /')]),
    ),
    G + F + "<parameter=s>\nrm -rf /": (
        ("", [("g", "{}")]),
        ("", [("g", "{}"), ("f", "")]),
        ("", [("g", "{}"), ("f", '{"s": "rm -rf /')]),
    ),
    f(o="{1, 2}"): ((f(o="{1, 2}"), []), None, ("", [("f", '{"o": "{1, 2}"}')])),
    f(o="..."): ((f(o="..."), []), None, ("", [("f", '{"o": "..."}')])),
    **{
        f(**{key: text}): (
            ("", [("f", stock)]),
            ("", [("f", stock)]),
            ("", [("f", ours)]),
        )
        for key, text, stock, ours in (
            ("n", "nan", '{"n": NaN}', '{"n": "nan"}'),
            ("n", "1e999", '{"n": Infinity}', '{"n": "1e999"}'),
            ("o", '{"x": "\\ud83d"}', '{"o": {"x": "\ud83d"}}', '{"o": {"x": "\\ud83d"}}'),
            ("s", "null", '{"s": null}', '{"s": "null"}'),
            ("b", "yes", '{"b": false}', '{"b": "yes"}'),
            ("r", '{"x": 1}', '{"r": "{\\"x\\": 1}"}', '{"r": {"x": 1}}'),
            ("u", '["x"]', '{"u": "[\\"x\\"]"}', '{"u": ["x"]}'),
        )
    },
}


@pytest.mark.parametrize("text", TOOL_CALL_FAILURES)
def test_stock_tool_call_failures(text):
    stock_whole, stock_streamed, ours = TOOL_CALL_FAILURES[text]
    assert whole(Qwen3CoderDetector(), text) == stock_whole
    if stock_streamed is None:
        with pytest.raises(TypeError):
            streamed(Qwen3CoderDetector(), text)
    else:
        assert streamed(Qwen3CoderDetector(), text) == stock_streamed
    assert whole(Step35ToolCallDetector(), text) == ours
    assert streamed(Step35ToolCallDetector(), text) == ours


def reason(detector, text: str, size: int | None = None) -> tuple[str, str]:
    if size is None:
        results = [detector.detect_and_parse(text)]
    else:
        chunks = [text[at : at + size] for at in range(0, len(text), size)]
        results = [detector.parse_streaming_increment(chunk) for chunk in chunks]
        results.append(detector.finish())
    reasoning = "".join(result.reasoning_text for result in results)
    return reasoning, "".join(result.normal_text for result in results)


def test_stock_reasoning_failures():
    text = "a</think>The <think> tag"
    assert reason(DeepSeekR1Detector(), text) == ("a", "The <think> tag")
    assert reason(DeepSeekR1Detector(), text, 100) == ("a", "The  tag")
    assert reason(DeepSeekR1Detector(), text, 1) == ("a tag", "The ")
    assert reason(DeepSeekR1Detector(), "a\n</think>\nb") == ("a\n", "\nb")
    assert reason(DeepSeekR1Detector(), "plan" + G) == ("plan" + G, "")
    with pytest.raises(TypeError):
        DeepSeekR1Detector(continue_final_message=True, previous_content=None)
    stock = DeepSeekR1Detector(force_nonempty_content=True)
    assert reason(stock, "a</think>") == ("", "a")
    assert reason(stock, "a</think>", 1) == ("a", "")
