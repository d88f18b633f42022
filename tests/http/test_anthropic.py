"""anthropic.py: requests with newer fields, thinking shown or left out, stop sequences; whole and streamed."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter, ValidationError

from sglang_step35.http.anthropic import CountTokensRequest, MessagesRequest, Step35AnthropicServing
from tests.http.fakes import DONE, MODEL, Chat, answer, call_part, chunk, event, read, usage_chunk

BODY = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Größe?"}]}
DISABLED = {"type": "disabled"}
ENABLED = {"type": "enabled", "budget_tokens": 1024}
EVENT = TypeAdapter(RawMessageStreamEvent)
OPENING = chunk(role="assistant", content="", reasoning_content=None)
THINKING = [OPENING, chunk(reasoning_content="Ich denke"), chunk(reasoning_content=" nach.")]
CALLS = [
    chunk(tool_calls=[call_part(0, "", "look", "call_1")]),
    chunk(tool_calls=[call_part(0, '{"ort": "K')]),
    chunk(tool_calls=[call_part(0, 'öln"}'), call_part(1, '{"n": 2}', "count", "call_2")]),
]


def signed(payload: dict) -> dict:
    """As the library's types want it: SGLang leaves out the signature that only Anthropic can write."""
    for block in [*payload.get("content", ()), payload.get("content_block", {})]:
        if block.get("type") == "thinking":
            block.setdefault("signature", "")
    return payload


def ask(chat: Chat, **fields):
    request = MessagesRequest.model_validate(BODY | fields)
    raw = SimpleNamespace()
    return asyncio.run(Step35AnthropicServing(chat).handle_messages(request, raw))


def whole(reply, **fields) -> Message:
    response = ask(Chat(reply), **fields)
    assert response.status_code == 200
    return Message.model_validate(signed(json.loads(response.body)))


def events(chunks: list, **fields) -> list[dict]:
    """The payloads of a stream, each under its own name."""
    frames = "".join(asyncio.run(read(ask(Chat(chunks), stream=True, **fields))))
    found = []
    for frame in frames.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def streamed(chunks: list, **fields) -> Message:
    """The message that the library puts together."""
    snapshot, buffers = None, {}
    for payload in events(chunks, **fields):
        parsed = EVENT.validate_python(signed(payload))
        snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    return snapshot


def blocks(message: Message) -> list[tuple]:
    found = []
    for block in message.content:
        if block.type == "tool_use":
            found.append((block.type, block.id, block.name, block.input))
        else:
            found.append((block.type, block.thinking if block.type == "thinking" else block.text))
    return found


def ending(finish: str = "stop", stop: int | str | None = None) -> list[str]:
    return [chunk(finish=finish, stop=stop), usage_chunk(), DONE]


REQUESTS = [MessagesRequest, CountTokensRequest]


@pytest.mark.parametrize("request_class", REQUESTS)
def test_an_unknown_display_of_thinking_is_left_out(request_class):
    body = BODY | {"thinking": {"type": "adaptive", "display": "updates"}}
    thinking = request_class.model_validate(body).thinking
    assert (thinking.type, thinking.display) == ("adaptive", None)
    assert body["thinking"]["display"] == "updates"


@pytest.mark.parametrize("request_class", REQUESTS)
@pytest.mark.parametrize("display", ["summarized", "omitted"])
def test_known_displays_stay(request_class, display):
    thinking = request_class.model_validate(BODY | {"thinking": {**ENABLED, "display": display}}).thinking
    assert (thinking.display, thinking.budget_tokens) == (display, 1024)


@pytest.mark.parametrize("request_class", REQUESTS)
@pytest.mark.parametrize("thinking", [{"type": "no_such"}, {"type": "enabled"}, 5, {**ENABLED, "display": 5}])
def test_other_thinking_is_checked_as_before(request_class, thinking):
    with pytest.raises(ValidationError):
        request_class.model_validate(BODY | {"thinking": thinking})


@pytest.mark.parametrize("body", [[], "flat", 5, None])
def test_bodies_that_are_no_objects_are_refused_as_such(body):
    with pytest.raises(ValidationError):
        MessagesRequest.model_validate(body)


def test_a_whole_answer_has_thinking_text_calls_and_counts():
    call = [call_part(0, '{"ort": "Köln"}', "look", "call_1")]
    message = whole(answer("tool_calls", reasoning_content="Hm.", content="Gleich.", tool_calls=call))
    expected = [("thinking", "Hm."), ("text", "Gleich."), ("tool_use", "call_1", "look", {"ort": "Köln"})]
    assert blocks(message) == expected
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (11, 7)


def test_a_streamed_answer_adds_up_to_the_same():
    message = streamed([*THINKING, chunk(content="Gleich, "), chunk(content="五."), *CALLS, *ending("tool_calls")])
    assert blocks(message) == [
        ("thinking", "Ich denke nach."), ("text", "Gleich, 五."),
        ("tool_use", "call_1", "look", {"ort": "Köln"}), ("tool_use", "call_2", "count", {"n": 2}),
    ]  # fmt: skip
    assert message.stop_reason == "tool_use" and message.usage.output_tokens == 7


def test_disabled_thinking_is_left_out_of_a_whole_answer():
    assert blocks(whole(answer(reasoning_content="Hm.", content="Ja"), thinking=DISABLED)) == [("text", "Ja")]
    assert blocks(whole(answer("length", reasoning_content="Hm.", content=None), thinking=DISABLED)) == [("text", "")]


def test_disabled_thinking_is_left_out_of_a_stream_and_blocks_count_from_zero():
    chunks = [*THINKING, chunk(content="Ja"), chunk(reasoning_content="Hm."), *CALLS, *ending("tool_calls")]
    found = events(chunks, thinking=DISABLED)
    assert "denke" not in json.dumps(found) and "Hm." not in json.dumps(found)
    starts = [(e["index"], e["content_block"]["type"]) for e in found if e["type"] == "content_block_start"]
    assert starts == [(0, "text"), (1, "tool_use"), (2, "tool_use")]
    assert [e["index"] for e in found if e["type"] == "content_block_stop"] == [0, 1, 2]
    message = streamed(chunks, thinking=DISABLED)
    assert blocks(message)[1:] == [("tool_use", "call_1", "look", {"ort": "Köln"}),
                                   ("tool_use", "call_2", "count", {"n": 2})]  # fmt: skip
    assert message.usage.output_tokens == 7


@pytest.mark.parametrize("thinking", [None, ENABLED, {"type": "adaptive"}])
def test_thinking_is_shown_unless_disabled(thinking):
    assert blocks(whole(answer(reasoning_content="Hm.", content="Ja"), thinking=thinking))[0] == ("thinking", "Hm.")
    message = streamed([*THINKING, chunk(content="Ja"), *ending()], thinking=thinking)
    assert blocks(message) == [("thinking", "Ich denke nach."), ("text", "Ja")]


def test_the_chat_endpoint_is_not_asked_to_disable_thinking():
    for thinking, asked in ((DISABLED, []), (ENABLED, [True])):
        chat = Chat(answer(content="Ja"))
        ask(chat, thinking=thinking)
        assert chat.reasoning == asked


def test_other_models_can_disable_thinking():
    chat = Chat(answer(reasoning_content="Hm.", content="Ja"), "OtherForCausalLM")
    content = json.loads(ask(chat, thinking=DISABLED).body)["content"]
    assert chat.reasoning == [False] and content[0] == {"type": "thinking", "thinking": "Hm."}


def test_requests_at_the_same_time_do_not_hide_each_others_thinking():
    serving = Step35AnthropicServing(Chat(answer(reasoning_content="Hm.", content="Ja")))
    requests = [MessagesRequest.model_validate(BODY | {"thinking": thinking}) for thinking in (DISABLED, None)]

    async def both() -> list:
        return await asyncio.gather(*(serving.handle_messages(request, SimpleNamespace()) for request in requests))

    contents = [json.loads(response.body)["content"] for response in asyncio.run(both())]
    assert [[block["type"] for block in content] for content in contents] == [["text"], ["thinking", "text"]]


@pytest.mark.parametrize("stop", ["\n\n", '"', "終", "End of text", "\\"])
@pytest.mark.parametrize("thinking", [None, DISABLED])
def test_a_stop_sequence_is_named(stop, thinking):
    message = whole(answer(stop=stop, content="Ja"), thinking=thinking, stop_sequences=[stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    message = streamed([OPENING, chunk(content="Ja"), *ending(stop=stop)], thinking=thinking, stop_sequences=[stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.usage.output_tokens == 7 and blocks(message) == [("text", "Ja")]


@pytest.mark.parametrize(
    ("finish", "stop", "reason"), [("stop", 2, "end_turn"), ("stop", None, "end_turn"), ("length", None, "max_tokens")]
)
def test_other_ends_name_no_stop_sequence(finish, stop, reason):
    message = whole(answer(finish, stop, content="Ja"))
    assert (message.stop_reason, message.stop_sequence) == (reason, None)
    message = streamed([chunk(content="Ja"), *ending(finish, stop)])
    assert (message.stop_reason, message.stop_sequence) == (reason, None)


def test_text_that_looks_like_a_stop_sequence_is_text():
    text = '"matched_stop":"x"'
    message = streamed([chunk(content=text), *ending(stop=2)])
    assert (message.stop_reason, blocks(message)) == ("end_turn", [("text", text)])


def test_stop_sequences_reach_the_chat_endpoint():
    chat = Chat(answer(content="Ja"))
    ask(chat, stop_sequences=["\n\n", "終"])
    assert chat.requests[0].stop == ["\n\n", "終"]


@pytest.mark.parametrize("thinking", [None, DISABLED])
def test_an_error_in_a_stream_is_an_event_and_blocks_are_closed(thinking):
    broken = event(error={"object": "error", "message": "it broke", "type": "BadRequestError", "code": 400})
    found = events([*THINKING, chunk(content="Ja"), broken], thinking=thinking)
    starts, stops = ([e["index"] for e in found if e["type"] == f"content_block_{kind}"] for kind in ("start", "stop"))
    assert starts == stops == ([0, 1] if thinking is None else [0])
    assert found[-2] == {"type": "error", "error": {"type": "invalid_request_error", "message": "it broke"}}
    raised = events([ValueError("too long")], thinking=thinking)
    assert [e["type"] for e in raised] == ["message_start", "error", "message_stop"]
    assert raised[1]["error"] == {"type": "invalid_request_error", "message": "too long"}


SOURCES = [
    {"type": "base64", "media_type": "image/png", "data": "AAAA"},
    {"type": "url", "url": "http://localhost/a.png"},
    {"type": "file", "file_id": "file_1"},  # stock would leave it out and answer
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("in_result", [False, True])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source["type"])
def test_an_image_is_refused(source, in_result, stream):
    block = {"type": "image", "source": source}
    if in_result:
        block = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "a"}, block]}
    messages = [BODY["messages"][0], {"role": "assistant", "content": "Ja."}, {"role": "user", "content": [block]}]
    response = ask(Chat(answer(content="a")), messages=messages, stream=stream)
    assert response.status_code == 400
    error = json.loads(response.body)
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert error["error"]["message"] == "messages.2: this model takes text only, remove the image"


def test_the_tokens_of_an_image_are_not_counted():
    message = {"role": "user", "content": [{"type": "image", "source": SOURCES[0]}]}
    request = CountTokensRequest(model=MODEL, messages=[message])
    response = asyncio.run(Step35AnthropicServing(Chat(None)).handle_count_tokens(request, SimpleNamespace()))
    assert response.status_code == 400 and b"takes text only" in response.body


def test_search_results_are_no_images():
    block = {"type": "search_result", "title": "a", "content": [{"type": "image"}, {"type": "text", "text": "b"}]}
    assert whole(answer(content="a"), messages=[{"role": "user", "content": [block]}]).content[0].text == "a"
