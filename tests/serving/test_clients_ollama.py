"""Ollama's own library against a running server: chat, generate, tools, formats, model details."""

import json

import ollama
import pytest
import requests

from tests.support.clients import ANSWER_SCHEMA, CLIENT_ARGS, FILE_QUESTION, MODEL, OPENAI_TOOLS, QUESTION

pytestmark = pytest.mark.server
USER = [{"role": "user", "content": QUESTION}]
FILE_USER = [{"role": "user", "content": FILE_QUESTION}]


@pytest.fixture(scope="module")
def server(serve):
    return serve(*CLIENT_ARGS)


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(host=server.url, timeout=120)


def limits(count=120, **more) -> dict:
    return {"temperature": 0, "num_predict": count, **more}


def chat(client, **more):
    return client.chat(**{"model": MODEL, "messages": USER, "options": limits()} | more)


def calls_of(message) -> list[tuple]:
    return [(call.function.name, dict(call.function.arguments)) for call in message.tool_calls or ()]


def same(client, **more):
    """The whole answer, after checking that the streamed one equals it."""
    whole = chat(client, **more)
    parts = list(chat(client, stream=True, **more))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert "".join(part.message.thinking or "" for part in parts) == (whole.message.thinking or "")
    assert [call for part in parts for call in calls_of(part.message)] == calls_of(whole.message)
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    last = parts[-1]
    assert (last.done_reason, last.eval_count) == (whole.done_reason, whole.eval_count)
    assert last.prompt_eval_count == whole.prompt_eval_count and last.total_duration > 0
    return whole


def test_models(client):
    assert [model.model for model in client.list().models] == [MODEL]
    shown = client.show(MODEL)
    assert {"completion", "tools", "thinking"} <= set(shown.capabilities)


def test_chat_separates_thinking(client):
    whole = same(client)
    assert whole.message.thinking and whole.message.content
    assert "</think>" not in whole.message.thinking + whole.message.content
    hidden = same(client, think=False)
    assert hidden.message.thinking is None and hidden.message.content == whole.message.content


def test_chat_options(client):
    cut = same(client, options=limits(5))
    assert cut.done_reason == "length" and cut.eval_count == 5
    text = chat(client).message.content
    stop = text[8:12]
    stopped = same(client, options=limits(stop=[stop], seed=7, top_k=40, repeat_penalty=1.0, num_ctx=4096))
    assert stopped.message.content == text.split(stop)[0] and stopped.done_reason == "stop"


def test_chat_tools_and_their_results(client):
    whole = same(client, messages=FILE_USER, tools=OPENAI_TOOLS, options=limits(300))
    calls = calls_of(whole.message)
    assert calls and all(name in ("read_file", "search") and arguments for name, arguments in calls)
    result = {"role": "tool", "tool_name": calls[0][0], "content": "def add(a, b):"}
    turn = {"role": "assistant", "tool_calls": whole.message.model_dump()["tool_calls"]}
    again = same(client, messages=[*FILE_USER, turn, result], tools=OPENAI_TOOLS)
    assert again.prompt_eval_count > whole.prompt_eval_count


@pytest.mark.parametrize("form", ["json", ANSWER_SCHEMA])
def test_chat_formats(client, form):
    if form == "json":  # any object: greedy nano need not close it
        whole = chat(client, format=form, options=limits(200))
        assert whole.message.content.lstrip().startswith("{")
        return
    value = json.loads(same(client, format=form, options=limits(600)).message.content)
    assert set(value) == {"kind", "count"}


def test_generate_streams_the_whole_text(client):
    for more in ({}, {"system": "Be brief."}, {"raw": True}):
        options = {"model": MODEL, "prompt": QUESTION, "options": limits(), **more}
        whole = client.generate(**options)
        parts = list(client.generate(**options, stream=True))
        assert "".join(part.response for part in parts) == whole.response
        assert "".join(part.thinking or "" for part in parts) == (whole.thinking or "")
        assert parts[-1].eval_count == whole.eval_count
        assert bool(whole.thinking) == ("raw" not in more)


def test_generate_uses_the_chat_template_unless_raw(client):
    templated = client.generate(model=MODEL, prompt=QUESTION, options=limits())
    assert templated.response == chat(client).message.content
    raw = client.generate(model=MODEL, prompt=QUESTION, raw=True, options=limits(8))
    assert raw.prompt_eval_count < templated.prompt_eval_count


def test_an_empty_prompt_loads_the_model(client):
    loaded = client.generate(model=MODEL, prompt="")
    assert loaded.done and loaded.response == ""


def test_requests_as_curl_sends_them(server):
    """`curl -d` calls its JSON a form."""
    body = {"model": MODEL, "messages": USER, "options": limits(4), "stream": False}
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = requests.post(f"{server.url}/api/chat", data=json.dumps(body), headers=headers, timeout=60)
    assert response.status_code == 200 and response.json()["eval_count"] == 4


def test_errors_are_the_librarys_own(client):
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError) as caught:
            list(chat(client, options={"temperature": -1}, stream=stream))
        assert caught.value.status_code == 400 and "temperature" in caught.value.error
    with pytest.raises(ollama.ResponseError):
        chat(client, messages=[{"role": "user", "content": "word " * 20000}])
