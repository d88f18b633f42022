"""Stand-ins for the chat endpoint and what surrounds it: they answer what a test tells them to."""

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace

from fastapi.responses import StreamingResponse
from sglang.srt.entrypoints.openai.protocol import ChatCompletionResponse
from sglang.srt.sampling.sampling_params import SamplingParams

MODEL = "step3p5"
VOCABULARY = 100
USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
DONE = "data: [DONE]\n\n"


def tokenizer_manager(architecture: str = "Step3p5ForCausalLM") -> SimpleNamespace:
    """The parts of SGLang's TokenizerManager that http/ reads."""
    hf_config = SimpleNamespace(architectures=[architecture])
    return SimpleNamespace(
        model_config=SimpleNamespace(vocab_size=VOCABULARY, hf_config=hf_config, is_multimodal=False, context_len=4096),
        sampling_params_class=SamplingParams,
        served_model_name=MODEL,
        preferred_sampling_params=None,
        create_abort_task=lambda request: None,
        gracefully_exit=False,
    )


def event(**payload) -> str:
    """A server-sent event in the form SGLang's encoder gives it: no spaces, text as it is."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


def chunk(finish: str | None = None, stop: int | str | None = None, usage: dict | None = None, **delta) -> str:
    """One chunk of a streamed chat answer."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "matched_stop": stop}
    head = {"id": "chat-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return event(**head, choices=[choice], usage=usage)


def usage_chunk() -> str:
    head = {"id": "chat-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return event(**head, choices=[], usage=USAGE)


def call_part(index: int, arguments: str, name: str | None = None, call_id: str | None = None) -> dict:
    """A piece of a tool call: the first one names it."""
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(finish: str = "stop", stop: int | str | None = None, **message) -> ChatCompletionResponse:
    """A whole chat answer."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish, "matched_stop": stop}
    return ChatCompletionResponse(id="chat-1", model=MODEL, choices=[choice], usage=USAGE)


class Chat:
    """The chat endpoint: answers each request with `reply`, chunks for a stream or a whole answer."""

    supports_inline_system = False

    def __init__(self, reply, architecture: str = "Step3p5ForCausalLM"):
        self.reply = reply
        self.requests: list = []
        self.reasoning: list[bool] = []
        self.tokenizer_manager = tokenizer_manager(architecture)

    async def handle_request(self, request, raw_request):
        """As Ollama's API calls it."""
        self.requests.append(request)
        if isinstance(self.reply, list):
            return StreamingResponse(self._generate_chat_stream(), media_type="text/event-stream")
        return self.reply

    def supports_native_reasoning_history(self) -> bool:
        return True

    def apply_reasoning_enabled(self, request, enabled: bool) -> None:
        self.reasoning.append(enabled)

    def _validate_request(self, request) -> str | None:
        return None

    def _convert_to_internal_request(self, request, raw_request):
        self.requests.append(request)
        return SimpleNamespace(received_time=0.0), request

    async def _handle_non_streaming_request(self, *request):
        await asyncio.sleep(0)  # others run meanwhile
        return copy.deepcopy(self.reply)

    async def _generate_chat_stream(self, *request) -> AsyncIterator[str]:
        for item in self.reply:
            if isinstance(item, Exception):
                raise item
            yield item


async def read(response) -> list[str]:
    """Everything a streaming response sends, piece by piece."""
    pieces = [piece async for piece in response.body_iterator]
    return [piece if isinstance(piece, str) else piece.decode() for piece in pieces]
