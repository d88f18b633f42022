"""ollama.py: answers of the chat endpoint, as Ollama's own library reads them."""

import asyncio
import json
from types import SimpleNamespace

import ollama
import pytest
from sglang.srt.entrypoints.openai.protocol import CompletionResponse

from sglang_step35.http.ollama import Step35OllamaServing
from sglang_step35.http.ollama_protocol import OllamaChatRequest, OllamaGenerateRequest
from tests.http.fakes import (
    DONE,
    MODEL,
    USAGE,
    Chat,
    answer,
    call_part,
    chunk,
    event,
    read,
    tokenizer_manager,
    usage_chunk,
)

USER = {"role": "user", "content": "Größe?"}
OPENING = chunk(role="assistant", content="", reasoning_content=None)
THINKING = [OPENING, chunk(reasoning_content="Ich denke"), chunk(reasoning_content=" nach.")]


def ask(reply, prompt: str | None = None, completion: Chat | None = None, **fields):
    """The response to a chat, or to a prompt."""
    serving = Step35OllamaServing(tokenizer_manager())
    state = SimpleNamespace(openai_serving_chat=Chat(reply), openai_serving_completion=completion)
    raw = SimpleNamespace(app=SimpleNamespace(state=state))
    if prompt is not None:
        body = OllamaGenerateRequest(model=MODEL, prompt=prompt, **fields)
        return asyncio.run(serving.handle_generate(body, raw))
    body = OllamaChatRequest(**{"model": MODEL, "messages": [USER]} | fields)
    return asyncio.run(serving.handle_chat(body, raw))


def lines(chunks: list, **fields) -> list[dict]:
    response = ask(chunks, **fields)
    assert response.headers["content-type"] == "application/x-ndjson"
    pieces = asyncio.run(read(response))
    assert all(piece.endswith("\n") and piece.count("\n") == 1 for piece in pieces)
    return [json.loads(piece) for piece in pieces]


def streamed(chunks: list, **fields) -> list[ollama.ChatResponse]:
    found = [ollama.ChatResponse.model_validate(line) for line in lines(chunks, **fields)]
    assert [part.done for part in found] == [False] * (len(found) - 1) + [True]
    assert all(part.model == MODEL and part.created_at for part in found)
    return found


def whole(reply, **fields) -> ollama.ChatResponse:
    response = ask(reply, stream=False, **fields)
    assert response.status_code == 200
    return ollama.ChatResponse.model_validate_json(response.body)


def calls_of(message) -> list[tuple]:
    return [(call.function.name, dict(call.function.arguments)) for call in message.tool_calls or ()]


def test_every_chunk_is_a_line_with_thinking_apart():
    text = [chunk(content="Fünf "), chunk(content="Meter, 五.")]
    found = streamed([*THINKING, *text, chunk(finish="stop"), usage_chunk(), DONE])
    assert [(part.message.thinking, part.message.content) for part in found] == [
        ("Ich denke", ""), (" nach.", ""), (None, "Fünf "), (None, "Meter, 五."), (None, ""),
    ]  # fmt: skip
    assert all(part.message.role == "assistant" for part in found)


def test_text_of_the_last_chunk_is_kept():
    found = streamed([OPENING, chunk(content="ab"), chunk(content="cd", finish="stop"), DONE])
    assert "".join(part.message.content for part in found) == "abcd"


def test_thinking_and_text_of_one_chunk_are_one_line():
    first, _ = streamed([chunk(reasoning_content="Hm.", content="Ja"), chunk(finish="stop"), DONE])
    assert (first.message.thinking, first.message.content) == ("Hm.", "Ja")


@pytest.mark.parametrize("think", [True, None, "high"])
def test_thinking_is_shown_unless_declined(think):
    chunks = [*THINKING, chunk(content="Ja"), chunk(finish="stop"), DONE]
    assert "".join(part.message.thinking or "" for part in streamed(chunks, think=think)) == "Ich denke nach."
    assert whole(answer(reasoning_content="Hm.", content="Ja"), think=think).message.thinking == "Hm."


def test_declined_thinking_is_left_out_with_its_lines():
    found = streamed([*THINKING, chunk(content="Ja"), chunk(finish="stop"), DONE], think=False)
    assert [(part.message.thinking, part.message.content) for part in found] == [(None, "Ja"), (None, "")]
    message = whole(answer(reasoning_content="Hm.", content="Ja"), think=False).message
    assert (message.thinking, message.content) == (None, "Ja")


def test_the_last_line_counts():
    last = streamed([chunk(content="a"), chunk(finish="stop"), usage_chunk(), DONE])[-1]
    assert (last.prompt_eval_count, last.eval_count, last.done_reason) == (11, 7, "stop")
    assert last.total_duration > 0 and last.load_duration == 0 and last.eval_duration > 0


@pytest.mark.parametrize(("details", "cached"), [({"cached_tokens": 5}, 5), (None, None)])
def test_cached_tokens_are_counted_beside_ollamas_own_fields(details, cached):
    usage = USAGE | {"prompt_tokens_details": details}
    last = lines([chunk(content="a"), chunk(finish="stop", usage=usage), DONE])[-1]
    assert (last["prompt_eval_count"], last["prompt_cached_count"]) == (11, cached)


def test_counts_of_the_last_chunk_stand_though_others_hold_none():
    chunks = [chunk(content="a", usage={**USAGE, "completion_tokens": 3}), chunk(content="b", usage=USAGE)]
    assert streamed([*chunks, chunk(finish="stop"), DONE])[-1].eval_count == 7


@pytest.mark.parametrize(
    ("finish", "reason"), [("stop", "stop"), ("length", "length"), ("tool_calls", "stop"), ("content_filter", "stop")]
)
def test_reasons_are_ollamas(finish, reason):
    assert streamed([chunk(content="a"), chunk(finish=finish), usage_chunk(), DONE])[-1].done_reason == reason
    assert whole(answer(finish, content="a")).done_reason == reason


def test_pieces_of_calls_become_whole_calls_before_the_end():
    chunks = [
        chunk(content="Gleich."),
        chunk(tool_calls=[call_part(0, "", "look", "call_1")]),
        chunk(tool_calls=[call_part(0, '{"ort": "K'), call_part(1, '{"n"', "count", "call_2")]),
        chunk(tool_calls=[call_part(1, ": 2}"), call_part(0, 'öln"}')]),
        chunk(finish="tool_calls"), usage_chunk(), DONE,
    ]  # fmt: skip
    text, calls, end = streamed(chunks)
    assert text.message.content == "Gleich." and calls.message.content == ""
    assert calls_of(calls.message) == [("look", {"ort": "Köln"}), ("count", {"n": 2})]
    assert end.message.tool_calls is None and end.eval_count == 7


def test_a_call_without_arguments_has_an_empty_object():
    found = streamed([chunk(tool_calls=[call_part(0, "", "look", "call_1")]), chunk(finish="tool_calls"), DONE])
    assert calls_of(found[0].message) == [("look", {})]


def test_calls_of_a_whole_answer():
    parts = [call_part(0, '{"ort": "Köln"}', "look", "call_1"), call_part(1, "", "count", "call_2")]
    message = whole(answer("tool_calls", content=None, tool_calls=parts)).message
    assert message.content == "" and calls_of(message) == [("look", {"ort": "Köln"}), ("count", {})]


def test_a_call_cut_by_the_length_limit_is_left_out():
    parts = [call_part(0, '{"n": 1}', "count", "call_1"), call_part(1, '{"ort": "K', "look", "call_2")]
    assert calls_of(whole(answer("length", content=None, tool_calls=parts)).message) == [("count", {"n": 1})]
    found = streamed([chunk(tool_calls=parts), chunk(finish="length"), usage_chunk(), DONE])
    assert calls_of(found[0].message) == [("count", {"n": 1})] and found[-1].done_reason == "length"


def test_a_whole_answer_is_done_and_counts():
    found = whole(answer(content="Größe 五", reasoning_content="Hm."))
    assert (found.done, found.prompt_eval_count, found.eval_count) == (True, 11, 7)
    assert (found.model, found.message.role, found.message.content) == (MODEL, "assistant", "Größe 五")


def test_an_empty_answer_is_an_empty_text():
    assert whole(answer(content=None)).message.content == ""
    assert [part.message.content for part in streamed([OPENING, chunk(finish="stop"), usage_chunk(), DONE])] == [""]


def test_an_error_in_a_stream_ends_it_as_the_library_expects():
    broken = event(error={"message": "it broke", "type": "server_error", "code": 500})
    found = lines([chunk(content="a"), broken, chunk(content="b"), DONE])
    assert found[0]["message"]["content"] == "a" and found[1:] == [{"error": "it broke"}]


def test_a_request_that_cannot_be_a_chat_is_refused():
    response = ask(None, options={"num_predict": -3})
    assert response.status_code == 400
    assert json.loads(response.body) == {"error": "num_predict must be -2, -1 or at least 0, got -3"}
    wrong = ask(None, tools=[{}])
    [message] = json.loads(wrong.body).values()
    assert wrong.status_code == 400 and message.startswith("tools.0.function: ") and "\n" not in message


def test_errors_of_the_chat_endpoint_go_on_to_the_middleware():
    refusal = SimpleNamespace(status_code=400)
    assert ask(refusal) is refusal


def test_generate_answers_in_its_own_fields():
    chunks = [*THINKING, chunk(content="Fünf"), chunk(finish="length"), usage_chunk(), DONE]
    found = [ollama.GenerateResponse.model_validate(line) for line in lines(chunks, prompt="Größe?")]
    assert [(part.thinking, part.response) for part in found] == [
        ("Ich denke", ""), (" nach.", ""), (None, "Fünf"), (None, ""),
    ]  # fmt: skip
    assert (found[-1].done, found[-1].done_reason, found[-1].eval_count) == (True, "length", 7)
    body = ask(answer(content="Fünf", reasoning_content="Hm."), prompt="Größe?", stream=False).body
    response = ollama.GenerateResponse.model_validate_json(body)
    assert (response.response, response.thinking, response.done) == ("Fünf", "Hm.", True)


@pytest.mark.parametrize("prompt", ["", " \n"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_empty_prompt_loads_the_model(prompt, stream):
    loaded = ollama.GenerateResponse.model_validate_json(ask(None, prompt=prompt, stream=stream).body)
    assert (loaded.done, loaded.done_reason, loaded.response, loaded.model) == (True, "load", "", MODEL)


def test_a_raw_prompt_is_completed_as_it_stands():
    choice = {"index": 0, "text": "Fünf", "finish_reason": "length"}
    completion = Chat(CompletionResponse(id="c", model=MODEL, choices=[choice], usage=USAGE))
    options = {"num_predict": 9, "temperature": 0, "stop": ["終"]}
    body = ask(None, prompt="Größe:", raw=True, stream=False, options=options, completion=completion).body
    [request] = completion.requests
    assert (request.prompt, request.max_tokens, request.temperature, request.stop) == ("Größe:", 9, 0, ["終"])
    response = ollama.GenerateResponse.model_validate_json(body)
    assert (response.response, response.done_reason, response.eval_count) == ("Fünf", "length", 7)


def test_a_raw_stream_holds_the_text_of_its_last_chunk():
    pieces = [("Fü", None), ("nf", "stop")]
    chunks = [event(choices=[{"index": 0, "text": text, "finish_reason": end}]) for text, end in pieces]
    completion = Chat([*chunks, event(choices=[], usage=USAGE), DONE])
    found = lines([], prompt="Größe:", raw=True, completion=completion)
    assert [line["response"] for line in found] == ["Fü", "nf", ""] and found[-1]["eval_count"] == 7
    assert completion.requests[0].stream_options.include_usage


def test_the_model_can_think_and_call_tools():
    shown = Step35OllamaServing(tokenizer_manager()).get_show(MODEL)
    assert ollama.ShowResponse.model_validate(shown.model_dump()).capabilities == ["completion", "tools", "thinking"]
