"""OpenAI's own library against a running server: completions, chat, responses; streamed and whole."""

import json

import openai
import pytest

from tests.support.clients import (
    ANSWER_SCHEMA,
    CLIENT_ARGS,
    FILE_QUESTION,
    MODEL,
    OPENAI_TOOLS,
    QUESTION,
    SEARCH_QUESTION,
)

pytestmark = pytest.mark.server
USER = [{"role": "user", "content": QUESTION}]
FILE_USER = [{"role": "user", "content": FILE_QUESTION}]
SEARCH_USER = [{"role": "user", "content": SEARCH_QUESTION}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": ANSWER_SCHEMA}}


@pytest.fixture(scope="module")
def server(serve):
    return serve(*CLIENT_ARGS)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def chat(client, **options):
    options = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 120} | options
    return client.chat.completions.create(**options)


def joined(stream) -> dict:
    """The message that a stream of chunks adds up to."""
    found = {"content": "", "reasoning": "", "calls": {}, "finish": None, "usage": None, "logprobs": []}
    for chunk in stream:
        found["usage"] = chunk.usage or found["usage"]
        for choice in chunk.choices:
            found["content"] += choice.delta.content or ""
            found["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            found["finish"] = choice.finish_reason or found["finish"]
            found["logprobs"] += choice.logprobs.content if choice.logprobs else []
            for part in choice.delta.tool_calls or ():
                call = found["calls"].setdefault(part.index, {"id": part.id, "name": "", "arguments": ""})
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
    return found


def calls_of(message) -> list[tuple[str, dict]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def streamed_calls(found: dict) -> list[tuple[str, dict]]:
    return [(call["name"], json.loads(call["arguments"])) for _, call in sorted(found["calls"].items())]


def same(found: dict, choice) -> None:
    message = choice.message
    assert found["content"] == (message.content or "")
    assert found["reasoning"] == (message.reasoning_content or "")
    assert streamed_calls(found) == calls_of(message)
    assert found["finish"] == choice.finish_reason


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completions_stream_the_whole_text(client):
    options = {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 40
    assert chunks[-1].usage.completion_tokens == 40


def test_completion_logprobs_echo_stop_and_several_choices(client):
    options = {"model": MODEL, "prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**options, logprobs=3, n=2).choices
    assert len(answer) == 2 and answer[0].text == answer[1].text
    logprobs = answer[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    assert "".join(logprobs.tokens) == answer[0].text
    for logprob, top in zip(logprobs.token_logprobs, logprobs.top_logprobs):
        assert logprob == pytest.approx(max(top.values()), abs=1e-3)  # greedy
    assert client.completions.create(**options, echo=True).choices[0].text.startswith("def add(a, b):")
    stop = answer[0].text[6:9]
    cut = client.completions.create(**options, stop=stop).choices[0]
    assert cut.finish_reason == "stop" and cut.text == answer[0].text.split(stop)[0]
    batch = client.completions.create(**options | {"prompt": ["def add(a, b):", "import os"]})
    assert [choice.index for choice in batch.choices] == [0, 1] and batch.choices[0].text == answer[0].text


def test_chat_separates_reasoning_and_streams_the_same(client):
    whole = chat(client)
    assert whole.choices[0].message.reasoning_content and "</think>" not in whole.choices[0].message.reasoning_content
    assert whole.choices[0].message.content
    found = joined(chat(client, stream=True, stream_options={"include_usage": True}))
    same(found, whole.choices[0])
    assert found["usage"].completion_tokens == whole.usage.completion_tokens
    assert found["usage"].prompt_tokens == whole.usage.prompt_tokens


def test_chat_history_with_reasoning_and_tool_results(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "a.py"}'}}
    turn = {"role": "assistant", "content": None, "reasoning_content": "I read a.py.", "tool_calls": [call]}
    messages = [*FILE_USER, turn, {"role": "tool", "tool_call_id": "call_1", "content": "def add(a, b):"}]
    whole = chat(client, messages=messages, tools=OPENAI_TOOLS)
    same(joined(chat(client, messages=messages, tools=OPENAI_TOOLS, stream=True)), whole.choices[0])
    assert whole.usage.prompt_tokens > chat(client, messages=FILE_USER, tools=OPENAI_TOOLS).usage.prompt_tokens


def test_chat_logprobs_cover_every_token_streamed_or_not(client):
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 24}
    whole = chat(client, **options)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens and all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.logprob <= 1e-6 and entry.top_logprobs[0].token == entry.token for entry in entries)
    streamed = joined(chat(client, **options, stream=True))["logprobs"]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    expected = [entry.logprob for entry in entries]
    assert [entry.logprob for entry in streamed] == pytest.approx(expected, abs=0.05)  # bfloat16


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "search"}}])
def test_chat_tool_calls(client, choice):
    messages = SEARCH_USER if isinstance(choice, dict) else FILE_USER
    options = {"messages": messages, "tools": OPENAI_TOOLS, "tool_choice": choice, "max_tokens": 300}
    whole = chat(client, **options)
    calls = calls_of(whole.choices[0].message)
    assert calls and whole.choices[0].finish_reason == "tool_calls"
    for name, arguments in calls:
        assert name in ("read_file", "search") and arguments and all(isinstance(v, str) for v in arguments.values())
    if isinstance(choice, dict):
        assert {name for name, _ in calls} == {"search"}
    found = joined(chat(client, **options, stream=True))
    same(found, whole.choices[0])
    assert all(call["id"] for call in found["calls"].values())


def test_chat_without_tools_writes_no_call(client):
    none = chat(client, messages=FILE_USER, tools=OPENAI_TOOLS, tool_choice="none", max_tokens=60)
    assert not none.choices[0].message.tool_calls


def test_chat_json_schema(client):
    whole = chat(client, response_format=FORMAT, max_tokens=600)
    value = json.loads(whole.choices[0].message.content)
    assert set(value) == {"kind", "count"} and value["kind"] in ("yes", "no") and isinstance(value["count"], int)
    assert whole.choices[0].message.reasoning_content
    same(joined(chat(client, response_format=FORMAT, max_tokens=600, stream=True)), whole.choices[0])


def respond(client, **options):
    options = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 150} | options
    return client.responses.create(**options)


def by_type(response) -> dict[str, list]:
    found: dict[str, list] = {}
    for item in response.output:
        found.setdefault(item.type, []).append(item)
    return found


def test_responses_stream_ends_with_the_whole_response(client):
    whole = respond(client)
    assert whole.status in ("completed", "incomplete") and whole.output_text
    reasoning = by_type(whole)["reasoning"][0].content[0].text
    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == reasoning
    last = events[-1].response
    assert last.output_text == whole.output_text and last.status == whole.status
    assert last.usage.output_tokens == whole.usage.output_tokens


def test_responses_tool_calls(client):
    tools = [{"type": "function", **tool["function"], "strict": False} for tool in OPENAI_TOOLS]
    options = {"input": FILE_QUESTION, "tools": tools, "tool_choice": "required", "max_output_tokens": 300}
    whole = respond(client, **options)
    calls = [(item.name, json.loads(item.arguments)) for item in by_type(whole)["function_call"]]
    assert calls and all(name in ("read_file", "search") for name, _ in calls)
    events = list(respond(client, **options, stream=True))
    done = [e.arguments for e in events if e.type == "response.function_call_arguments.done"]
    assert [json.loads(arguments) for arguments in done] == [arguments for _, arguments in calls]
    assert "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta") == "".join(done)


def test_responses_json_schema(client):
    text = {"format": {"type": "json_schema", "name": "answer", "strict": True, "schema": ANSWER_SCHEMA}}
    first = respond(client, text=text, max_output_tokens=600)
    assert set(json.loads(first.output_text)) == {"kind", "count"}
    events = list(respond(client, text=text, max_output_tokens=600, stream=True))
    assert events[-1].response.output_text == first.output_text


def test_errors_are_the_librarys_own(client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, temperature=-1)
    assert "temperature" in caught.value.message and caught.value.body["type"] == "invalid_request_error"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError):
            chat(client, messages=[{"role": "user", "content": "word " * 20000}], stream=stream)
        with pytest.raises(openai.BadRequestError):
            respond(client, max_output_tokens=10**9, stream=stream)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")
