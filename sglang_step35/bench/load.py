"""Sends sessions to an OpenAI-compatible endpoint, so many at a time, and measures every answer."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from sglang_step35.bench.stream import Answer, BadStream, Result
from sglang_step35.bench.workloads import Session

LINE_BYTES = 1 << 22  # a chunk with logprobs or token ids is one long line
PROBE_SECONDS = 10
# An idle connection is used again within so many seconds: SGLang closes it after 5, perhaps while it is taken.
KEPT_SECONDS = 2.0

# What may be asked beyond OpenAI's own fields. A hosted API may refuse a field it does not know.
EXTRA_FIELDS = {
    "sglang": {"ignore_eos": True, "return_spec_tokens_details": True},
    "vllm": {"ignore_eos": True},
    "llamacpp": {"ignore_eos": True},
    "other": {},
}


@dataclass(frozen=True)
class Endpoint:
    """`url` with or without its /v1; `engine` as /v1/models names its owner."""

    url: str
    model: str
    engine: str = "other"
    api_key: str | None = field(default=None, repr=False)
    chat_only: bool = False  # no /v1/completions: plain prompts are sent as a user message
    timeout: float = 600.0

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")


@asynccontextmanager
async def connect(endpoint: Endpoint) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    async with aiohttp.ClientSession(
        headers=headers,
        read_bufsize=LINE_BYTES,
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS),
        timeout=aiohttp.ClientTimeout(total=endpoint.timeout),
    ) as client:
        yield client


async def identify(client: aiohttp.ClientSession, endpoint: Endpoint) -> str:
    """The engine behind the endpoint, "other" when it does not say."""
    try:
        timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
        async with client.get(f"{endpoint.root}/v1/models", timeout=timeout) as response:
            models = (await response.json(content_type=None))["data"]
            owner = models[0].get("owned_by")
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError, AttributeError):
        return "other"
    return owner if owner in EXTRA_FIELDS else "other"


def request_body(endpoint: Endpoint, session: Session, messages: list[dict], tokens: int) -> tuple[str, dict]:
    """Path and JSON body of a session's next request; `messages` is the conversation so far."""
    body = {
        "model": endpoint.model,
        "max_tokens": tokens,
        "temperature": session.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **EXTRA_FIELDS[endpoint.engine],
    }
    if not session.ignore_eos:
        body.pop("ignore_eos", None)
    if session.prompt is not None and not endpoint.chat_only:
        return "/v1/completions", body | {"prompt": session.prompt}
    if session.tools:
        body["tools"] = list(session.tools)
    return "/v1/chat/completions", body | {"messages": messages}


async def send(client: aiohttp.ClientSession, endpoint: Endpoint, path: str, body: dict) -> Result:
    """One request; whatever goes wrong becomes an error in the result, so that a sweep goes on."""
    start = time.perf_counter()
    answer = Answer()
    try:
        async with client.post(f"{endpoint.root}{path}", json=body) as response:
            if response.status != 200:
                detail = (await response.text())[:200]
                return Result(error=f"http {response.status}", detail=detail)
            async for line in response.content:
                answer.feed(line, time.perf_counter() - start)
        return answer.result()
    except BadStream as error:
        return Result(error=error.kind, detail=str(error))
    except TimeoutError:
        return Result(error="timeout", detail=f"{endpoint.timeout} s")
    except aiohttp.ClientConnectorError as error:
        return Result(error="connect", detail=type(error).__name__)
    except (aiohttp.ClientError, ValueError) as error:
        return Result(error="broken off", detail=f"{type(error).__name__}: {error}"[:200])


async def converse(client, endpoint: Endpoint, session: Session, tokens: int, finished) -> list[Result]:
    """All requests of a session in order. A failed turn ends it: the next one would not be the same request."""
    messages: list[dict] = [{"role": "system", "content": session.system}] if session.system else []
    turns = session.turns if session.prompt is None else (session.prompt,)
    results = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        path, body = request_body(endpoint, session, messages, tokens)
        results.append(await send(client, endpoint, path, body))
        finished(results[-1])
        if results[-1].error:
            skipped = Result(error="skipped turn", detail="an earlier turn of its session failed")
            rest = [skipped] * (len(turns) - len(results))
            for result in rest:
                finished(result)
            return results + rest
        # The true answer goes back, as an agent would send it, so that a prefix cache may hit on it.
        messages.append({"role": "assistant", "content": results[-1].text or "(no text)"})
    return results


async def run_sessions(
    client: aiohttp.ClientSession,
    endpoint: Endpoint,
    sessions: list[Session],
    concurrency: int,
    tokens: int,
    finished: Callable[[Result], None] = lambda result: None,
) -> tuple[list[Result], float]:
    """Closed loop: `concurrency` clients, each takes the next session when its own is over. Also the seconds."""
    waiting = iter(sessions)

    async def worker() -> list[Result]:
        results = []
        for session in waiting:  # shared: next() on it is atomic between awaits
            results += await converse(client, endpoint, session, tokens, finished)
        return results

    start = time.perf_counter()
    batches = await asyncio.gather(*(worker() for _ in range(concurrency)))
    return [result for batch in batches for result in batch], time.perf_counter() - start
