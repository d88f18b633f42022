"""The Ollama API on top of SGLang's chat endpoint."""

import json
import time
from collections.abc import AsyncIterator

from fastapi.responses import JSONResponse, StreamingResponse
from sglang.srt.entrypoints.ollama.serving import OllamaServing
from sglang.srt.entrypoints.openai.protocol import CompletionRequest

from sglang_step35.http.errors import find_error


class Step35OllamaServing(OllamaServing):
    """Replaces OllamaServing.

    Kept: the model list and its details. Replaced: chat and generate, because stock (0.5.23)
    - drops the text of the last chunk of a stream, which with MTP holds up to four tokens;
    - gives the reasoning with its `</think>` as content, and knows neither tools nor `format`;
    - fails with status 500 on the option `seed` and on everything the sampler refuses;
    - reports "stop" for an answer cut at `num_predict`, and no counts at the end of a stream;
    - prompts without the chat template in /api/generate, also when `raw` is not set.
    """

    async def handle_chat(self, request, raw_request):
        return await self._answer(request, raw_request, _chat_reply)

    async def handle_generate(self, request, raw_request):
        if not request.prompt.strip() and not request.system:
            # How the command line client loads a model.
            done = {"response": "", "done": True, "done_reason": "load"}
            return JSONResponse(self._stamped(done))
        return await self._answer(request, raw_request, _generate_reply)

    def get_show(self, model: str):
        shown = super().get_show(model)
        shown.capabilities = ["completion", "tools", "thinking"]
        return shown

    async def _answer(self, request, raw_request, reply):
        state = raw_request.app.state
        serving, chat = state.openai_serving_chat, None
        try:
            if getattr(request, "raw", False):
                serving, chat = state.openai_serving_completion, _raw_completion(request)
            else:
                chat = request.to_chat()
        except ValueError as error:
            return JSONResponse({"error": _first_problem(error)}, status_code=400)
        started = time.perf_counter_ns()
        answer = await serving.handle_request(chat, raw_request)
        if isinstance(answer, StreamingResponse):
            answer.body_iterator = self._lines(answer.body_iterator, request, reply, started)
            answer.headers["content-type"] = "application/x-ndjson"
            return answer
        if not hasattr(answer, "choices"):
            return answer  # an error, which the middleware words for Ollama
        answer = answer.model_dump()
        piece = _Piece(answer["choices"][0], request.think)
        content = reply(piece.text, piece.thinking, piece.calls())
        end = _end(piece.finish_reason, answer["usage"], started)
        return JSONResponse(self._stamped(content | end))

    async def _lines(self, events, request, reply, started: int) -> AsyncIterator[bytes]:
        """Server-sent events of the chat endpoint as lines of JSON."""
        calls: dict[int, dict] = {}
        finish, usage = None, None
        async for event in events:
            text = event if isinstance(event, str) else event.decode()
            data = text.removeprefix("data:").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            problem = find_error(chunk)
            if problem is not None:
                yield json.dumps({"error": problem.message}).encode() + b"\n"
                return
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                piece = _Piece(choice, request.think)
                piece.collect(calls)
                finish = piece.finish_reason or finish
                if piece.text or piece.thinking:
                    yield self._line(reply(piece.text, piece.thinking, []) | {"done": False})
        if calls:
            yield self._line(reply("", "", _ollama_calls(calls.values())) | {"done": False})
        yield self._line(reply("", "", []) | _end(finish, usage, started))

    def _line(self, content: dict) -> bytes:
        return json.dumps(self._stamped(content)).encode() + b"\n"

    def _stamped(self, content: dict) -> dict:
        name = self.tokenizer_manager.served_model_name
        return {"model": name, "created_at": self._get_timestamp(), **content}


class _Piece:
    """What a choice of a chat or completion answer, or of a chunk of one, holds."""

    def __init__(self, choice: dict, think):
        message = choice.get("message") or choice.get("delta") or choice
        self.text = message.get("content") or message.get("text") or ""
        reasoning = message.get("reasoning_content") or ""
        # The model always reasons; `think: false` asks not to see it.
        self.thinking = "" if think is False else reasoning
        self.finish_reason = choice.get("finish_reason")
        self._calls = message.get("tool_calls") or []

    def calls(self) -> list[dict]:
        return _ollama_calls(call["function"] for call in self._calls)

    def collect(self, calls: dict[int, dict]) -> None:
        """Add the pieces of calls in this chunk to the calls by their index."""
        for part in self._calls:
            call = calls.setdefault(part.get("index") or 0, {"name": "", "arguments": ""})
            for key in call:
                call[key] += part["function"].get(key) or ""


def _ollama_calls(functions) -> list[dict]:
    """Calls with their arguments as objects; arguments cut off by the length limit are left out."""
    calls = []
    for function in functions:
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except ValueError:
            continue
        calls.append({"function": {"name": function["name"], "arguments": arguments}})
    return calls


def _chat_reply(text: str, thinking: str, calls: list[dict]) -> dict:
    message = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def _generate_reply(text: str, thinking: str, calls: list[dict]) -> dict:
    return {"response": text} | ({"thinking": thinking} if thinking else {})


def _end(finish_reason: str | None, usage: dict | None, started: int) -> dict:
    """Added to Ollama's counts: how many of the prompt's tokens were cached, which its clients pass over."""
    usage = usage or {}
    details = usage.get("prompt_tokens_details") or {}
    passed = time.perf_counter_ns() - started
    return {
        "done": True,
        "done_reason": "length" if finish_reason == "length" else "stop",
        "total_duration": passed,
        "load_duration": 0,
        "prompt_eval_count": usage.get("prompt_tokens"),
        "prompt_cached_count": details.get("cached_tokens"),
        "prompt_eval_duration": 0,
        "eval_count": usage.get("completion_tokens"),
        "eval_duration": passed,
    }


def _raw_completion(request) -> CompletionRequest:
    chat = request.to_chat()
    shared = chat.model_fields_set & CompletionRequest.model_fields.keys()
    fields = {name: getattr(chat, name) for name in shared}
    return CompletionRequest(prompt=request.prompt, **fields)


def _first_problem(error: ValueError) -> str:
    """Text of a ValueError, or of the first error of a pydantic one."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    first = errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
