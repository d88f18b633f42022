"""Ollama's requests, and their translation to SGLang's chat requests.

Replaces SGLang's request classes (0.5.23), which drop tools, tool calls and reasoning, refuse an
assistant turn without text, and read `options` without looking at what is in them.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, Field
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

UNLIMITED = (-1, -2)  # num_predict: as long as the context allows


class OllamaOptions(BaseModel):
    """The options that mean something here; Ollama ignores unknown ones, so do we."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    num_predict: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None

    def chat_fields(self) -> dict[str, Any]:
        fields = self.model_dump(exclude_none=True)
        if "repeat_penalty" in fields:
            fields["repetition_penalty"] = fields.pop("repeat_penalty")
        limit = fields.pop("num_predict", None)
        if limit is not None and limit not in UNLIMITED:
            if limit < 0:
                raise ValueError(f"num_predict must be -2, -1 or at least 0, got {limit}")
            fields["max_tokens"] = limit
        return fields


class OllamaFunction(BaseModel):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class OllamaToolCall(BaseModel):
    function: OllamaFunction


class OllamaChatMessage(BaseModel):
    role: str
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None
    images: list[str] | None = None


class _OllamaRequest(BaseModel):
    model: str
    stream: bool = True
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    keep_alive: float | str | None = None
    think: bool | Literal["low", "medium", "high"] | None = None

    def _chat(self, messages: list[dict], **more) -> ChatCompletionRequest:
        """The chat request; raises ValueError for what SGLang's class refuses."""
        fields = {"model": self.model, "messages": messages, "stream": self.stream, **more}
        fields |= (self.options or OllamaOptions()).chat_fields()
        if isinstance(self.think, str):
            fields["reasoning_effort"] = self.think
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif self.format:
            schema = {"name": "response", "schema": self.format}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.stream:
            fields["stream_options"] = {"include_usage": True}
        return ChatCompletionRequest(**fields)


class OllamaChatRequest(_OllamaRequest):
    """Body of /api/chat."""

    messages: list[OllamaChatMessage]
    tools: list[dict[str, Any]] | None = None

    def to_chat(self) -> ChatCompletionRequest:
        more = {"tools": self.tools} if self.tools else {}
        return self._chat(_openai_messages(self.messages), **more)


class OllamaGenerateRequest(_OllamaRequest):
    """Body of /api/generate. `raw` asks for the prompt as it stands, without the chat template."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[str] | None = None

    def to_chat(self) -> ChatCompletionRequest:
        system = [OllamaChatMessage(role="system", content=self.system)] if self.system else []
        user = OllamaChatMessage(role="user", content=self.prompt, images=self.images)
        return self._chat(_openai_messages([*system, user]))


def _openai_messages(messages: list[OllamaChatMessage]) -> list[dict]:
    """Ollama names no call: results follow their calls in order."""
    found, waiting = [], []
    for message in messages:
        if message.images:
            raise ValueError("this model does not support images")
        entry: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.role == "assistant":
            if message.thinking:
                entry["reasoning_content"] = message.thinking
            if message.tool_calls:
                numbered = enumerate(message.tool_calls)
                calls = [_openai_call(len(found), i, call) for i, call in numbered]
                waiting += [call["id"] for call in calls]
                entry["tool_calls"] = calls
        elif message.role == "tool":
            entry["tool_call_id"] = waiting.pop(0) if waiting else "call_unknown"
        found.append(entry)
    return found


def _openai_call(turn: int, index: int, call: OllamaToolCall) -> dict:
    function = {"name": call.function.name, "arguments": json.dumps(call.function.arguments)}
    return {"id": f"call_{turn}_{index}", "type": "function", "function": function}
