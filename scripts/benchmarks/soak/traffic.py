"""What is sent: requests of every kind a server may meet, each checked for the answer of its kind."""

import contextlib
import json
import random
import threading
import uuid
from collections.abc import Callable

import requests

from sglang_step35.bench.servers import Server
from tests.support.clients import ANSWER_SCHEMA, FILE_QUESTION, MODEL, OPENAI_TOOLS, QUESTION
from tests.support.malformed import JSON, Malformed, encode, good_bodies, malformed
from tests.support.nano_model import prompts

CONTEXT = 2048  # tokens; the server's --context-length, so that prompts at the limit are quick
RESERVED = 4  # of them: SGLang keeps room for a round's drafts
PATIENCE = 300  # seconds
CASES = [case for case in malformed() if len(case.body) < 20_000]  # those of megabytes take all of the time


class Traffic:
    """Requests at random until told to stop; keeps their kinds and what was wrong."""

    def __init__(self, server: Server, seed: int):
        self.server = server
        self.chance = random.Random(seed)
        self.sent: list[str] = []  # kinds; several threads append
        self.problems: list[str] = []

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            kind = self.chance.choice(tuple(KINDS))
            try:
                wrong = KINDS[kind](self)
            except (requests.RequestException, RuntimeError, LookupError, TypeError, ValueError) as error:
                wrong = f"{type(error).__name__}: {error}"
            self.sent.append(kind)
            if wrong:
                self.problems.append(f"{kind}: {wrong}"[:400])

    def ids(self, length: int) -> list[int]:
        """Held-out code from a random place."""
        start = self.chance.randrange(len(prompts()))
        return [token for ids in (prompts() * 2)[start : start + 60] for token in ids][:length]

    def chat(self, **fields) -> dict:
        body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48, **fields}
        response = self.server.post("/v1/chat/completions", body, timeout=PATIENCE)
        response.raise_for_status()
        return response.json()


def _schema(traffic: Traffic) -> str | None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER_SCHEMA}}
    (choice,) = traffic.chat(response_format=form, max_tokens=400)["choices"]
    if choice["finish_reason"] == "length" or not choice["message"]["content"]:
        return None  # cut off, or ended while it still reasoned, where no grammar holds
    found = json.loads(choice["message"]["content"])
    return None if found["kind"] in ("yes", "no") and isinstance(found["count"], int) else f"not the schema: {found}"


def _tools(traffic: Traffic) -> str | None:
    messages = [{"role": "user", "content": FILE_QUESTION}]
    (choice,) = traffic.chat(messages=messages, tools=OPENAI_TOOLS, temperature=0, max_tokens=200)["choices"]
    for call in choice["message"].get("tool_calls") or ():
        json.loads(call["function"]["arguments"])
    return None


def _sampling(traffic: Traffic) -> str | None:
    chance = traffic.chance
    fields = {
        "temperature": chance.choice((0, 0.7, 1.5)),
        "top_p": chance.choice((0.5, 0.9, 1)),
        "top_k": chance.choice((-1, 1, 40)),
        "min_p": chance.choice((0, 0.1)),
        "frequency_penalty": chance.choice((0, 0.5)),
        "repetition_penalty": chance.choice((1, 1.2)),
        "seed": chance.randrange(100),
        "n": chance.choice((1, 3)),
        "logprobs": chance.choice((True, False)),
    }
    choices = traffic.chat(**fields)["choices"]
    return None if len(choices) == fields["n"] else f"{len(choices)} answers for n = {fields['n']}"


def _abort(traffic: Traffic) -> str | None:
    """Ended by its id: the stream ends, with the tokens so far or with an error."""
    rid = uuid.uuid4().hex
    body = {"input_ids": traffic.ids(80), "rid": rid, "stream": True, "sampling_params": {"max_new_tokens": 900}}
    with contextlib.suppress(RuntimeError):
        for _ in traffic.server.stream("/generate", body, PATIENCE):
            traffic.server.post("/abort_request", {"rid": rid}).raise_for_status()
    return None


def _disconnect(traffic: Traffic) -> str | None:
    """A client that leaves: before its answer begins, or in the middle of it."""
    body = {"input_ids": traffic.ids(300), "stream": True, "sampling_params": {"max_new_tokens": 700}}
    if traffic.chance.random() < 0.3:
        with contextlib.suppress(requests.Timeout):
            traffic.server.post("/generate", body | {"stream": False}, timeout=0.2)
        return None
    stream = traffic.server.stream("/generate", body, PATIENCE)
    for _ in range(traffic.chance.randrange(1, 6)):
        next(stream, None)
    stream.close()
    return None


def _malformed(traffic: Traffic) -> str | None:
    case: Malformed = traffic.chance.choice(CASES)
    url = f"{traffic.server.url}{case.path}"
    response = requests.post(url, data=case.body, headers=dict(case.headers), timeout=PATIENCE)
    return None if 400 <= response.status_code < 500 else f"{case.path}, {case.what}: {response.status_code}"


def _limit(traffic: Traffic) -> str | None:
    """Prompts that leave just the room asked for, and some that leave none."""
    fits = CONTEXT - RESERVED - 8
    length = traffic.chance.choice((fits - 40, fits, CONTEXT - RESERVED, CONTEXT + 1))
    sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": traffic.ids(length), "sampling_params": sampling}
    response = traffic.server.post("/generate", body, timeout=PATIENCE)
    wanted = 200 if length <= fits else 400
    return None if response.status_code == wanted else f"{length} tokens: {response.status_code}, not {wanted}"


def _apis(traffic: Traffic) -> str | None:
    path, body = traffic.chance.choice(tuple(good_bodies().items()))
    url = f"{traffic.server.url}{path}"
    response = requests.post(url, data=encode(body), headers=JSON, timeout=PATIENCE)
    return None if response.ok else f"{path}: {response.status_code} {response.text[:200]}"


def _flush(traffic: Traffic) -> str | None:
    """Done when nothing runs, else refused."""
    status = traffic.server.post("/flush_cache", {}).status_code
    return None if status in (200, 400) else str(status)


KINDS: dict[str, Callable[[Traffic], str | None]] = {
    "schema": _schema,
    "tools": _tools,
    "sampling": _sampling,
    "abort": _abort,
    "disconnect": _disconnect,
    "malformed": _malformed,
    "limit": _limit,
    "apis": _apis,
    "flush": _flush,
}
