"""Anthropic's own library against a running server: messages, thinking, tools, token counts."""

import anthropic
import pytest

from tests.support.clients import ANTHROPIC_TOOLS, CLIENT_ARGS, FILE_QUESTION, MODEL, QUESTION, SEARCH_QUESTION

pytestmark = pytest.mark.server
USER = [{"role": "user", "content": QUESTION}]
FILE_USER = [{"role": "user", "content": FILE_QUESTION}]
SEARCH_USER = [{"role": "user", "content": SEARCH_QUESTION}]


@pytest.fixture(scope="module")
def client(serve):
    url = serve(*CLIENT_ARGS).url
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def options(**more) -> dict:
    return {"model": MODEL, "messages": USER, "max_tokens": 120, "extra_body": {"temperature": 0}} | more


def ask(client, **more):
    return client.messages.create(**options(**more))


def streamed(client, **more):
    """The message that the library puts together from a stream, and its text on the way."""
    with client.messages.stream(**options(**more)) as stream:
        text = "".join(stream.text_stream)
        return stream.get_final_message(), text


def blocks(message) -> list[tuple]:
    """The content without the ids, which differ from request to request."""
    found = []
    for block in message.content:
        if block.type == "thinking":
            found.append((block.type, block.thinking))
        elif block.type == "tool_use":
            found.append((block.type, block.name, block.input))
        else:
            found.append((block.type, block.text))
    return found


def same(client, **more):
    """The whole answer, after checking that the streamed one equals it."""
    whole = ask(client, **more)
    message, text = streamed(client, **more)
    assert blocks(message) == blocks(whole)
    assert (message.stop_reason, message.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert message.usage.output_tokens == whole.usage.output_tokens
    assert text == "".join(block.text for block in whole.content if block.type == "text")
    return whole


def test_thinking_precedes_the_text(client):
    whole = same(client)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert "</think>" not in whole.content[0].thinking and whole.content[1].text
    assert whole.stop_reason in ("end_turn", "max_tokens") and whole.role == "assistant"


@pytest.mark.parametrize("thinking", [{"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}])
def test_thinking_settings(client, thinking):
    """The model always reasons; clients that switch thinking off want an answer, not an error."""
    whole = same(client, thinking=thinking)
    kinds = [block.type for block in whole.content]
    assert kinds == (["text"] if thinking["type"] == "disabled" else ["thinking", "text"])


def test_length_and_stop_sequences(client):
    cut = same(client, max_tokens=5)
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 5
    text = ask(client).content[1].text
    stop = text[8:12]
    stopped = same(client, stop_sequences=["no such text", stop])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == stop
    assert stopped.content[-1].text == text.split(stop)[0]


def test_system_texts_and_blocks(client):
    plain = ask(client, system="Be brief.", max_tokens=8)
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    listed = ask(client, system=blocks, max_tokens=8)
    total = [m.usage.input_tokens + (m.usage.cache_read_input_tokens or 0) for m in (plain, listed)]
    assert total[0] == total[1] > client.messages.count_tokens(model=MODEL, messages=USER).input_tokens


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "search"}])
def test_tools(client, choice):
    messages = SEARCH_USER if "name" in choice else FILE_USER
    whole = same(client, messages=messages, tools=ANTHROPIC_TOOLS, tool_choice=choice, max_tokens=300)
    calls = [block for block in whole.content if block.type == "tool_use"]
    assert calls and whole.stop_reason == "tool_use"
    for call in calls:
        assert call.name in ("read_file", "search") and call.id and call.input
    if choice["type"] == "tool":
        assert {call.name for call in calls} == {"search"}


def test_a_tool_loop_goes_on(client):
    """The answer goes back as it came: thinking, call, and the call's result."""
    first = ask(client, messages=FILE_USER, tools=ANTHROPIC_TOOLS, tool_choice={"type": "any"}, max_tokens=300)
    calls = [block for block in first.content if block.type == "tool_use"]
    content = [block.model_dump(exclude_none=True) for block in first.content]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "def add(a, b):"} for call in calls]
    history = [*FILE_USER, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
    second = same(client, messages=history, tools=ANTHROPIC_TOOLS)
    assert second.content and second.usage.output_tokens > 0


def test_count_tokens_is_what_a_request_uses(client):
    for more in ({}, {"system": "Be brief."}, {"tools": ANTHROPIC_TOOLS}):
        counted = client.messages.count_tokens(model=MODEL, messages=USER, **more).input_tokens
        usage = ask(client, max_tokens=1, **more).usage
        assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_are_the_librarys_own(client):
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, extra_body={"temperature": -1})
    assert caught.value.body["error"]["type"] == "invalid_request_error" and "temperature" in caught.value.message
    too_long = [{"role": "user", "content": "word " * 20000}]
    with pytest.raises(anthropic.BadRequestError):
        ask(client, messages=too_long)
    with pytest.raises(anthropic.BadRequestError):
        streamed(client, messages=too_long)
