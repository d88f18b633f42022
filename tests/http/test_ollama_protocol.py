"""ollama_protocol.py: Ollama's bodies, and the chat requests they become."""

import json

import ollama
import pytest
from pydantic import ValidationError

from sglang_step35.http.ollama_protocol import OllamaChatRequest, OllamaGenerateRequest

USER = {"role": "user", "content": "Größe?"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def chat(messages: list | None = None, **fields):
    body = {"model": "step3p5", "messages": [USER] if messages is None else messages, **fields}
    return OllamaChatRequest.model_validate(body).to_chat()


def messages_of(request) -> list[dict]:
    return [message.model_dump(exclude_none=True) for message in request.messages]


def test_a_chat_streams_with_usage_unless_told_otherwise():
    request = chat()
    assert request.stream and request.stream_options.include_usage
    whole = chat(stream=False)
    assert not whole.stream and whole.stream_options is None


def test_options_have_openais_names():
    request = chat(
        options={
            "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "num_predict": 12, "stop": ["ende", "終"],
            "seed": 7, "presence_penalty": 0.2, "frequency_penalty": 0.3, "repeat_penalty": 1.1,
        }
    )  # fmt: skip
    assert (request.temperature, request.top_p, request.top_k, request.min_p) == (0.5, 0.9, 40, 0.1)
    assert (request.max_tokens, request.stop, request.seed) == (12, ["ende", "終"], 7)
    assert (request.presence_penalty, request.frequency_penalty, request.repetition_penalty) == (0.2, 0.3, 1.1)


def test_options_left_out_stay_with_the_server():
    given = chat(options={"temperature": None}).model_fields_set
    assert given.isdisjoint({"temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "stop", "seed"})


def test_zero_is_an_option_and_not_its_absence():
    request = chat(options={"temperature": 0, "seed": 0})
    assert (request.temperature, request.seed) == (0, 0) and {"temperature", "seed"} <= request.model_fields_set


@pytest.mark.parametrize(("limit", "expected"), [(-2, None), (-1, None), (1, 1), (10**6, 10**6)])
def test_num_predict_and_its_words_for_unlimited(limit, expected):
    assert chat(options={"num_predict": limit}).max_tokens == expected


def test_num_predict_below_its_words_is_refused():
    with pytest.raises(ValueError, match="num_predict must be -2, -1 or at least 0, got -3"):
        chat(options={"num_predict": -3})


def test_unknown_options_are_ignored():
    chat(options={"num_ctx": 4096, "mirostat": 1})


@pytest.mark.parametrize("stop", ["ende", ["ende"]])
def test_stop_is_one_text_or_several(stop):
    assert chat(options={"stop": stop}).stop == stop


def test_format_json_and_schemas():
    assert chat(format="json").response_format.type == "json_object"
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    form = chat(format=schema).response_format.model_dump(by_alias=True)
    assert form["type"] == "json_schema" and form["json_schema"]["schema"] == schema
    assert chat(format="").response_format is None and chat().response_format is None


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_think_may_name_an_effort(effort):
    assert chat(think=effort).reasoning_effort == effort


@pytest.mark.parametrize("think", [True, False, None])
def test_think_alone_names_no_effort(think):
    assert "reasoning_effort" not in chat(think=think).model_fields_set


@pytest.mark.parametrize(
    "body",
    [
        {"messages": "flat"}, {"messages": [{}]}, {"messages": [{"role": "user", "content": 5}]}, {"format": "yaml"},
        {"format": []}, {"think": "extreme"}, {"options": []}, {"options": {"temperature": "hot"}},
        {"options": {"top_k": 1.5}}, {"options": {"stop": [5]}}, {"tools": 5}, {"model": None}, {"stream": "perhaps"},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
    ],
)  # fmt: skip
def test_values_of_wrong_types_are_refused(body):
    with pytest.raises(ValidationError):
        OllamaChatRequest.model_validate({"model": "step3p5", "messages": [USER], **body})


def test_tools_that_the_chat_endpoint_refuses_are_a_value_error():
    with pytest.raises(ValueError, match="function"):
        chat(tools=[{}])


def test_images_are_refused():
    with pytest.raises(ValueError, match="images"):
        chat([{**USER, "images": ["aWNo"]}])
    with pytest.raises(ValueError, match="images"):
        OllamaGenerateRequest(model="step3p5", prompt="a", images=["aWNo"]).to_chat()


def call(name: str, **arguments) -> dict:
    return {"function": {"name": name, "arguments": arguments}}


def test_tools_pass_as_they_are():
    [tool] = chat(tools=[TOOL]).tools
    assert tool.function.name == "look" and tool.function.parameters == TOOL["function"]["parameters"]
    assert not chat(tools=[]).tools


def test_calls_and_results_are_matched_in_order_over_turns():
    turns = [
        USER,
        {"role": "assistant", "thinking": "Ich sehe nach.", "tool_calls": [call("a", ort="Köln"), call("b")]},
        {"role": "tool", "tool_name": "a", "content": "erstes"},
        {"role": "tool", "tool_name": "b", "content": "zweites"},
        {"role": "assistant", "content": "Noch eins.", "tool_calls": [call("a")]},
        {"role": "tool", "tool_name": "a", "content": "drittes"},
    ]
    found = messages_of(chat(turns))
    first, second = found[1]["tool_calls"]
    [third] = found[4]["tool_calls"]
    assert len({first["id"], second["id"], third["id"]}) == 3
    assert [m["tool_call_id"] for m in found if m["role"] == "tool"] == [first["id"], second["id"], third["id"]]
    assert first["function"]["name"] == "a" and json.loads(first["function"]["arguments"]) == {"ort": "Köln"}
    assert json.loads(second["function"]["arguments"]) == {}
    assert found[1]["reasoning_content"] == "Ich sehe nach." and found[1]["content"] == ""
    assert found[4]["content"] == "Noch eins." and "reasoning_content" not in found[4]


def test_a_result_without_a_call_is_still_a_result():
    found = messages_of(chat([USER, {"role": "tool", "content": "ü"}]))
    assert found[1]["content"] == "ü" and found[1]["tool_call_id"]


def test_the_librarys_own_message_goes_back_as_it_came():
    raw = {"message": {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call("a", n=1)]}}
    message = ollama.ChatResponse.model_validate(raw).message.model_dump(exclude_none=True)
    found = messages_of(chat([USER, message]))[1]
    assert found["reasoning_content"] == "Hm." and found["tool_calls"][0]["function"]["name"] == "a"


def test_only_assistants_think_and_call():
    found = messages_of(chat([{**USER, "thinking": "Hm.", "tool_calls": [call("a")]}]))
    assert found[0].keys() == {"role", "content"}


def test_no_message_loses_its_place_for_being_empty():
    found = messages_of(chat([{"role": "user", "content": ""}, {"role": "assistant"}, USER]))
    assert [m["content"] for m in found] == ["", "", "Größe?"]


def test_generate_is_a_chat_of_one_turn():
    request = OllamaGenerateRequest(model="step3p5", prompt="Größe?", system="Kurz.").to_chat()
    assert [(m["role"], m["content"]) for m in messages_of(request)] == [("system", "Kurz."), ("user", "Größe?")]
    alone = OllamaGenerateRequest(model="step3p5", prompt="Größe?", system="").to_chat()
    assert [m["role"] for m in messages_of(alone)] == ["user"]
