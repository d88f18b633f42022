"""Anthropic Messages for a model that always reasons."""

import copy
import json
from collections.abc import AsyncIterator

from pydantic import BaseModel, model_validator
from sglang.srt.entrypoints.anthropic import protocol
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing

from sglang_step35 import names
from sglang_step35.names import GUARDS_PARAM

KNOWN_DISPLAYS = ("summarized", "omitted")


class _AnyDisplay(BaseModel):
    """Added: a `thinking.display` newer than SGLang is left out instead of refused.

    It says how the client shows thinking, and SGLang acts on none. Claude Code 2.1 asks for
    "updates" when it streams, and would ask three times.
    """

    @model_validator(mode="before")
    @classmethod
    def _leave_out_unknown_display(cls, data):
        thinking = data.get("thinking") if isinstance(data, dict) else None
        display = thinking.get("display") if isinstance(thinking, dict) else None
        if isinstance(display, str) and display not in KNOWN_DISPLAYS:
            rest = {key: value for key, value in thinking.items() if key != "display"}
            data = {**data, "thinking": rest}
        return data


class MessagesRequest(_AnyDisplay, protocol.AnthropicMessagesRequest):
    """Replaces AnthropicMessagesRequest; kept: every field and check."""


class CountTokensRequest(_AnyDisplay, protocol.AnthropicCountTokensRequest):
    """Replaces AnthropicCountTokensRequest; kept: every field and check."""


class Step35AnthropicServing(AnthropicServing):
    """Replaces AnthropicServing.

    Kept: the translation to the chat endpoint and back. Replaced, because stock (0.5.23)
    - refuses or ignores `thinking: disabled`: Step-3.5 reasons anyway, so the thinking is left
      out of the answer instead (of this model's only);
    - reports a stop sequence as "end_turn", without naming it;
    - passes over `thinking.budget_tokens`, which a guard keeps;
    - leaves out images that it cannot translate, and counts the tokens of a request with images, for a text model.
    """

    _hidden = False  # whether this request's thinking is

    def _convert_to_chat_completion_request(self, anthropic_request):
        if not self.openai_serving_chat.tokenizer_manager.model_config.is_multimodal:
            _refuse_images(anthropic_request.messages)
        if self._hides(anthropic_request):
            anthropic_request = anthropic_request.model_copy(update={"thinking": None})
        budget, thinking = None, anthropic_request.thinking
        if thinking is not None and thinking.budget_tokens is not None and self._always_reasons:
            budget, thinking = thinking.budget_tokens, thinking.model_copy(update={"budget_tokens": None})
            anthropic_request = anthropic_request.model_copy(update={"thinking": thinking})
        chat = super()._convert_to_chat_completion_request(anthropic_request)
        if budget is not None:
            chat.custom_params = {GUARDS_PARAM: {"reasoning": {"tokens": budget}}}
        return chat

    def _hides(self, anthropic_request) -> bool:
        thinking = anthropic_request.thinking
        return thinking is not None and thinking.type == "disabled" and self._always_reasons

    @property
    def _always_reasons(self) -> bool:
        return names.is_ours(self.openai_serving_chat.tokenizer_manager.model_config.hf_config)

    async def _handle_non_streaming(self, chat_request, anthropic_request, raw_request):
        one = copy.copy(self)  # the conversion of the answer does not see the request
        one._hidden = self._hides(anthropic_request)
        return await super(Step35AnthropicServing, one)._handle_non_streaming(
            chat_request, anthropic_request, raw_request
        )

    def _convert_response(self, response):
        if self._hidden and response.choices:
            response.choices[0].message.reasoning_content = None
        answer = super()._convert_response(response)
        stop = response.choices[0].matched_stop if response.choices else None
        if isinstance(stop, str):  # a token id otherwise
            answer.stop_reason, answer.stop_sequence = "stop_sequence", stop
        return answer

    async def _generate_anthropic_stream(self, adapted, processed, anthropic_request, raw_request):
        one = copy.copy(self)
        chat = one.openai_serving_chat = _WithStop(self.openai_serving_chat)
        events = super(Step35AnthropicServing, one)._generate_anthropic_stream(
            adapted, processed, anthropic_request, raw_request
        )
        if self._hides(anthropic_request):
            events = _without_thinking(events)
        async for event in events:
            if chat.stop is not None and event.startswith("event: message_delta\n"):
                payload = _payload(event)
                payload["delta"] = {"stop_reason": "stop_sequence", "stop_sequence": chat.stop}
                event = _event(payload)
            yield event


def _refuse_images(messages) -> None:
    """Raise ValueError for an image block, inside a tool's result too."""
    for index, message in enumerate(messages):
        if _has_image(message.content):
            raise ValueError(f"messages.{index}: this model takes text only, remove the image")


def _has_image(content) -> bool:
    if content is None or isinstance(content, str):
        return False
    results = (block.content for block in content if block.type == "tool_result")
    return any(block.type == "image" for block in content) or any(_has_image(result) for result in results)


class _WithStop:
    """The chat endpoint for one stream, remembering the stop sequence that ended it."""

    def __init__(self, chat):
        self._chat = chat
        self.stop: str | None = None

    def __getattr__(self, name):
        return getattr(self._chat, name)

    async def _generate_chat_stream(self, *request) -> AsyncIterator[str]:
        async for event in self._chat._generate_chat_stream(*request):
            if '"matched_stop":"' in event:
                for choice in _payload(event).get("choices", ()):
                    self.stop = choice.get("matched_stop") or self.stop
            yield event


async def _without_thinking(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Leaves the thinking blocks out and numbers the others without them."""
    hidden: set[int] = set()
    async for event in events:
        payload = _payload(event)
        index = payload.get("index")
        if payload.get("content_block", {}).get("type") == "thinking":
            hidden.add(index)
        if index in hidden:
            continue
        if index is not None:
            payload["index"] = index - len(hidden)
        yield _event(payload)


def _payload(event: str) -> dict:
    return json.loads(event.partition("data: ")[2])


def _event(payload: dict) -> str:
    return f"event: {payload['type']}\ndata: {json.dumps(payload)}\n\n"
