"""The step3p5 parsers in SGLang: options, registration, and the server's code around them."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai import serving_chat
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, ToolChoice
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.qwen3_coder_detector import Qwen3CoderDetector
from sglang.srt.parser.reasoning_parser import ReasoningParser

from sglang_step35.parsers import detectors, register_parsers
from sglang_step35.parsers.detectors import Step35ReasoningDetector, Step35ToolCallDetector
from tests.parsers.test_reference import UNFINISHED
from tests.parsers.test_stock import TOOLS, F, G, f, reason

register_parsers()


@pytest.mark.parametrize("size", [None, 1, 3, 100])
def test_reasoning_options(size):
    def check(text, expected, **options):
        assert reason(Step35ReasoningDetector(**options), text, size) == expected

    check("plan" + G, ("plan" + G, ""))  # nothing parses calls
    check("plan" + G, ("plan", G), tool_call_parser_active=True)
    check("a</think>b", ("a", "b"), force_reasoning=False)
    check("a</think>b", ("a", "b"), stream_reasoning=False)
    check("a", ("a", ""), stream_reasoning=False)
    continued = {"continue_final_message": True}
    check("a</think>b", ("a", "b"), **continued, previous_content="so far ")
    check("a</think>b", ("a", "b"), **continued, previous_content=None)
    check("\na <think> b", ("", "\na <think> b"), **continued, previous_content="x</think>y")
    check("\na", ("", "a"), **continued, previous_content="x\n</think>")
    # Streamed reasoning cannot be taken back, so the answer repeats it.
    kept = "" if size is None else "a"
    check("a", (kept, "a"), force_nonempty_content=True)
    check("a</think>", (kept, "a"), force_nonempty_content=True)
    check("a</think>b", ("a", "b"), force_nonempty_content=True)


def test_reasoning_arrives_at_once_unless_asked():
    detector = Step35ReasoningDetector()
    assert detector.parse_streaming_increment("some text").reasoning_text == "some text"
    detector = Step35ReasoningDetector(stream_reasoning=False)
    assert detector.parse_streaming_increment("some text").reasoning_text == ""


def test_text_arguments_arrive_as_they_are_written():
    detector = Step35ToolCallDetector()
    detector.parse_streaming_increment(F + "<parameter=s>\nline", TOOLS)
    result = detector.parse_streaming_increment(' "two"\n', TOOLS)
    assert [call.parameters for call in result.calls] == [r" \"two\""]


def test_registration(monkeypatch):
    register_parsers()
    assert FunctionCallParser.ToolCallParserEnum["step3p5"] is Step35ToolCallDetector
    assert ReasoningParser.DetectorMap["step3p5"] is Step35ReasoningDetector
    assert FunctionCallParser.ToolCallParserEnum["qwen3_coder"] is Qwen3CoderDetector
    monkeypatch.setattr(ReasoningParser, "DetectorMap", {})
    with pytest.raises(RuntimeError, match="DetectorMap has no parser 'step3p5'"):
        register_parsers()


def test_structural_tag_is_stocks():
    ours = FunctionCallParser(TOOLS, "step3p5").get_structure_constraint("required")
    stock = FunctionCallParser(TOOLS, "qwen3_coder").get_structure_constraint("required")
    assert ours[0] == "structural_tag"
    assert ours[1].model_dump() == stock[1].model_dump()


@pytest.mark.parametrize("choice", ["required", ToolChoice(function={"name": TOOLS[0].function.name})])
def test_with_llguidance_required_calls_are_a_json_array(monkeypatch, choice):
    """SGLang compiles no structural tag of this kind with it, so that every such request would be refused."""
    published = SimpleNamespace(is_config_namespace_published=lambda name: True)
    monkeypatch.setattr(detectors, "get_context", lambda: published)
    kernel = SimpleNamespace(grammar_backend="llguidance")
    monkeypatch.setattr(detectors, "get_exec", lambda: SimpleNamespace(kernel=kernel))
    parser = FunctionCallParser(TOOLS, "step3p5")
    kind, schema = parser.get_structure_constraint(choice)
    assert kind == "json_schema" and schema["type"] == "array" and not parser.owns_tool_format()
    assert parser.get_structure_constraint("auto") is None


@pytest.fixture
def chat(monkeypatch):
    """The server's chat handler with just what its parsing reads."""
    serving = SimpleNamespace(incremental_streaming_output=True, enable_cache_report=False)
    monkeypatch.setattr(serving_chat, "get_serving", lambda: serving)
    handler = object.__new__(serving_chat.OpenAIServingChat)
    handler.tool_call_parser = handler.reasoning_parser = "step3p5"
    handler.template_manager = SimpleNamespace(force_reasoning=True)
    handler.tokenizer_manager = SimpleNamespace(tokenizer=None)
    handler._encoding_adapter = None
    return handler


def request() -> ChatCompletionRequest:
    return ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "q"}], tools=TOOLS, stream=True)


async def sse(chat, chunks: list[str], finish: str):
    """The handler's stream for chunks of output, as its own loop drives it."""
    reasoners, parsers, called = {}, {}, {}
    for index, chunk in enumerate(chunks):
        last = finish if index == len(chunks) - 1 else None
        content = {"text": chunk, "meta_info": {"id": "1"}}
        async for line in chat._generate_stream_content(
            content, 0, request(), 0, {}, reasoners, parsers, called, None, last, False, {}, {}, {}
        ):
            yield line
    complete = called and not serving_chat._incomplete_tool_call_indices(parsers[0])
    reason = "tool_calls" if complete and finish == "stop" else finish
    yield serving_chat.build_sse_content("1", 0, "m", 0, finish_reason=reason)
    yield "data: [DONE]\n\n"


async def gather(stream) -> list[dict]:
    lines = [line async for line in stream]
    return [json.loads(line.split("data: ")[1]) for line in lines if "[DONE]" not in line]


def deltas(chat, chunks: list[str], finish: str = "stop") -> tuple[str, str, list, str]:
    messages = asyncio.run(gather(sse(chat, chunks, finish)))
    reasoning = content = ""
    calls = []
    for delta in (message["choices"][0]["delta"] for message in messages):
        reasoning += delta.get("reasoning_content") or ""
        content += delta.get("content") or ""
        for call in delta.get("tool_calls") or []:
            function = call["function"]
            if function["name"]:
                calls.append([function["name"], ""])
            assert call["index"] == len(calls) - 1
            calls[-1][1] += function["arguments"]
    return reasoning, content, calls, messages[-1]["choices"][0]["finish_reason"]


@pytest.mark.parametrize("size", [1, 2, 4, 7, 16, 500])
def test_chat_stream_ends(chat, size):
    def check(text, *expected, finish="stop"):
        chunks = [text[at : at + size] for at in range(0, len(text), size)]
        assert deltas(chat, chunks, finish) == expected

    calls = [["g", "{}"], ["f", '{"s": "x"}']]
    check(f"why\n</think>\n{G}{f(s='x')}", "why", "", calls, "tool_calls")
    check("why</think>a <", "why", "a <", [], "stop")
    check(f"</think>{F}<parameter=s>\nx", "", "", [["f", '{"s": "x']], "length", finish="length")
    check(f"</think>{F}<parameter=s>\nx", "", "", [["f", '{"s": "x']], "stop")


@pytest.mark.parametrize("text", [G + f(s="x"), UNFINISHED + "<parameter=path>\nx", "no call <"])
def test_chat_whole_equals_stream(chat, text):
    text = text.removeprefix("</think>")
    _, content, calls, _ = deltas(chat, ["</think>" + text])
    result = chat._process_tool_calls(text, TOOLS, {"type": "stop"}, "auto")
    found = [[call.function.name, call.function.arguments] for call in result.tool_calls or []]
    assert (result.remaining_text, found) == (content, calls)


@pytest.mark.parametrize("detector, first", [(Step35ToolCallDetector, '{"s": "x"}'), (Qwen3CoderDetector, "")])
def test_anthropic_stream_keeps_arguments(chat, monkeypatch, detector, first):
    """Text behind a call's end in one chunk costs the call its arguments with stock's detector."""
    monkeypatch.setitem(FunctionCallParser.ToolCallParserEnum, "step3p5", detector)
    chunks = [f"</think>{F}<parameter=s>\nx", "\n</parameter>\n</function>\n</tool_call>\nDone."]
    chunks += [" Bye", G, ""]
    handler = object.__new__(AnthropicServing)
    handler.openai_serving_chat = SimpleNamespace(_generate_chat_stream=lambda *_: sse(chat, chunks, "stop"))
    stream = handler._generate_anthropic_stream(None, None, SimpleNamespace(model="m", thinking=None), None)
    blocks = []
    for event in asyncio.run(gather(stream)):
        if event["type"] == "content_block_start":
            blocks.append([event["content_block"].get("name"), ""])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            blocks[-1][1] += delta.get("partial_json") or delta.get("text") or ""
    assert blocks == [["f", first], [None, "\nDone. Bye"], ["g", "{}"]]
