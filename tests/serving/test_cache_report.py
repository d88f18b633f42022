"""Every API says how many of a prompt's tokens the prefix cache held; whole and streamed."""

import asyncio
import json
from operator import attrgetter

import anthropic
import ollama
import openai
import pytest

from sglang_step35.bench.load import Endpoint, connect, run_sessions
from sglang_step35.bench.workloads import Session
from tests.support.clients import CLIENT_ARGS, MODEL

pytestmark = pytest.mark.server
TEXT = "".join(f"def step_{i}(value):\n    return value + {i}\n" for i in range(20))
USER = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def server(serve):
    return serve(*CLIENT_ARGS)


def openai_usage(server, endpoint: str, stream: bool, **prompt):
    """(tokens of the prompt, those that were cached) as `endpoint` of the client reports them."""
    create = attrgetter(endpoint)(openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)).create
    options = {"model": MODEL, "max_tokens": 4, "temperature": 0, **prompt}
    if not stream:
        usage = create(**options).usage
    else:
        options |= {"stream": True, "stream_options": {"include_usage": True}}
        usage = [chunk.usage for chunk in create(**options)][-1]
    return usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens


def chat(server, stream: bool):
    return openai_usage(server, "chat.completions", stream, messages=USER)


def completion(server, stream: bool):
    return openai_usage(server, "completions", stream, prompt=TEXT)


def responses(server, stream: bool):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    options = {"model": MODEL, "input": TEXT, "max_output_tokens": 4, "temperature": 0}
    if not stream:
        usage = client.responses.create(**options).usage
    else:
        usage = list(client.responses.create(**options, stream=True))[-1].response.usage
    return usage.input_tokens, usage.input_tokens_details.cached_tokens


def messages(server, stream: bool):
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    options = {"model": MODEL, "messages": USER, "max_tokens": 4}
    if not stream:
        usage = client.messages.create(**options).usage
    else:
        with client.messages.stream(**options) as events:
            usage = events.get_final_message().usage
    cached = usage.cache_read_input_tokens or 0
    return usage.input_tokens + cached, cached


def ollama_chat(server, stream: bool):
    body = {"model": MODEL, "messages": USER, "options": {"num_predict": 4, "temperature": 0}, "stream": stream}
    last = json.loads(server.post("/api/chat", body).text.strip().splitlines()[-1])
    assert ollama.ChatResponse.model_validate(last).prompt_eval_count == last["prompt_eval_count"]
    return last["prompt_eval_count"], last["prompt_cached_count"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [chat, completion, responses, messages, ollama_chat])
def test_an_api_reports_what_the_cache_held(server, ask, stream):
    server.flush_cache()
    prompt, first = ask(server, stream)
    again, second = ask(server, stream)
    assert prompt == again > 200
    assert first == 0
    assert prompt - 4 <= second < prompt  # all but the last token and its look-ahead


def test_the_load_generator_reports_hits_from_the_answers(server):
    """The second of two equal sessions finds the first one's prompts."""
    server.flush_cache()
    sessions = [Session(system=TEXT, turns=("One?", "Two?"))] * 2

    async def drive():
        endpoint = Endpoint(server.url, MODEL, "sglang")
        async with connect(endpoint) as client:
            return (await run_sessions(client, endpoint, sessions, 1, 4))[0]

    results = asyncio.run(drive())
    assert [result.error for result in results] == [None] * 4
    assert results[0].cached_tokens == 0
    for result in results[2:]:
        assert result.prompt_tokens - 4 <= result.cached_tokens < result.prompt_tokens
