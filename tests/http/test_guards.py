"""guards.py and reminder.py: guards of server and request, what other fields mean, and a dialogue's reminder."""

import datetime
import json
from types import SimpleNamespace

import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_step35.guards.settings import GuardError, Reminder
from sglang_step35.http.admission import admit
from sglang_step35.http.anthropic import MessagesRequest, Step35AnthropicServing
from sglang_step35.http.guards import merged, servers_params, to_internal_request
from sglang_step35.http.ollama_protocol import OllamaChatRequest
from sglang_step35.http.reminder import remind
from tests.http.fakes import MODEL, Chat, answer, tokenizer_manager

LOOP, BUDGET = {"loop": True}, {"reasoning": {"tokens": 5}}


def manager(servers: dict | None = None, architecture: str = "Step3p5ForCausalLM"):
    found = tokenizer_manager(architecture)
    found.preferred_sampling_params = servers and {"custom_params": servers, "temperature": 0.5}
    return found


def admitted(servers: dict | None, sampling: dict | None) -> dict:
    """The `custom_params` that reach the scheduler."""
    obj = GenerateReqInput(text="a", sampling_params=sampling)
    admit(manager(servers), obj)
    return obj.sampling_params.get("custom_params")


def guards_of(custom: dict) -> dict:
    assert isinstance(custom["guards"], str), "only texts travel"
    return json.loads(custom["guards"])


def test_without_guards_nothing_changes():
    assert admitted(None, {}) is None and admitted(None, {"custom_params": {"a": 1}}) == {"a": 1}
    assert admitted({"speculative_depth": 2}, {}) == {"speculative_depth": 2}


@pytest.mark.parametrize("sampling", [None, {}, {"custom_params": None}, {"custom_params": {"speculative_depth": 0}}])
def test_the_servers_guards_are_every_requests(sampling):
    assert guards_of(admitted({"guards": LOOP}, sampling)) == LOOP


def test_of_each_guard_the_requests_own_counts():
    asked = {"custom_params": {"guards": {"loop": False} | BUDGET}}
    assert guards_of(admitted({"guards": LOOP | {"language": True}}, asked)) == {
        "loop": False, "language": True, "reasoning": {"tokens": 5},
    }  # fmt: skip


def test_every_prompt_of_a_batch_is_guarded_and_twice_is_as_once():
    obj = GenerateReqInput(text=["a", "b"], sampling_params=[{}, {"custom_params": {"guards": BUDGET}}])
    for _ in range(2):
        admit(manager({"guards": LOOP}), obj)
    assert [guards_of(p["custom_params"]) for p in obj.sampling_params] == [LOOP, LOOP | BUDGET]


@pytest.mark.parametrize("sampling", [{"custom_params": {"guards": {"lop": 1}}}, {"custom_params": {"guards": 5}}])
def test_what_is_wrong_is_refused_on_admission(sampling):
    with pytest.raises(ValueError, match="guards"):
        admitted(None, sampling)
    with pytest.raises(ValueError, match="sampling_params"):
        admitted({"guards": LOOP}, {"custom_params": 5})


def test_what_the_server_may_not_guard_stops_its_start():
    assert servers_params(None) == {} == servers_params({"temperature": 1})
    with pytest.raises(GuardError, match="loop.k is unknown"):
        servers_params({"custom_params": {"guards": {"loop": {"k": 1}}}})


def test_layers_of_guards():
    assert merged(None, None) is None
    assert merged(LOOP, None, {"loop": None}) == {"loop": None}


def chat(servers: dict | None = None, architecture: str = "Step3p5ForCausalLM", **fields):
    """The chat request as SGLang gets it, and what it becomes."""
    request = ChatCompletionRequest(model=MODEL, messages=[{"role": "user", "content": "Größe?"}], **fields)
    seen = []

    def stock(serving, request, raw_request):
        seen.append(request)
        return SimpleNamespace(require_reasoning=False), request

    serving = SimpleNamespace(tokenizer_manager=manager(servers, architecture))
    adapted, _ = to_internal_request(stock, serving, request)
    return seen[0], adapted


@pytest.mark.parametrize(("effort", "tokens"), [("none", 0), ("minimal", 1024), ("low", 4096), ("medium", 16384)])
def test_an_effort_is_a_budget(effort, tokens):
    request, adapted = chat(reasoning_effort=effort)
    assert request.custom_params == {"guards": {"reasoning": {"tokens": tokens}}}
    assert adapted.require_reasoning == (tokens == 0)


@pytest.mark.parametrize("effort", [None, "high", "xhigh", "max", 0.5])
def test_other_efforts_are_none(effort):
    request, _ = chat(reasoning_effort=effort)
    assert request.custom_params is None


def test_a_guard_of_the_request_counts_more_than_its_effort_and_that_more_than_the_servers():
    request, _ = chat({"guards": LOOP}, reasoning_effort="low", custom_params={"guards": BUDGET, "a": 1})
    assert request.custom_params == {"guards": BUDGET, "a": 1}
    servers = {"guards": {"reasoning": {"tokens": 9}}}
    asked = chat(servers, reasoning_effort="low")[0].custom_params
    assert guards_of(admitted(servers, {"custom_params": asked})) == {"reasoning": {"tokens": 4096}}


def test_other_models_are_left_alone():
    assert chat(architecture="LlamaForCausalLM", reasoning_effort="none")[0].custom_params is None


@pytest.mark.parametrize(("think", "tokens"), [("low", 4096), ("medium", 16384)])
def test_ollamas_levels_are_efforts(think, tokens):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "think": think}
    assert OllamaChatRequest.model_validate(body).to_chat().reasoning_effort == think


def test_anthropics_budget_is_kept():
    converted = []
    for thinking in (None, {"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 2048}):
        body = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "a"}], "thinking": thinking}
        serving = Step35AnthropicServing(Chat(answer(content="a")))
        converted.append(
            serving._convert_to_chat_completion_request(MessagesRequest.model_validate(body)).custom_params
        )
    assert converted == [None, None, None, {"guards": {"reasoning": {"tokens": 2048}}}]


TODAY = datetime.date(2026, 3, 4)


def messages(turns: int) -> list:
    found = [{"role": "system", "content": "Be brief.\n\nSpeak German.\nNever joke."}]
    for turn in range(turns):
        found += [{"role": "user", "content": f"question {turn}"}, {"role": "assistant", "content": f"answer {turn}"}]
    return ChatCompletionRequest(model=MODEL, messages=[*found, {"role": "user", "content": "last"}]).messages


def contents(found: list) -> list:
    return [message.content for message in found]


def test_every_nth_user_message_ends_with_the_reminder():
    reminder = Reminder(every=2, lines=2, identity="You are Step.")
    found = contents(remind(messages(3), reminder, TODAY))
    date = "\n\n[Reminder]\nToday is Wednesday, 2026-03-04.\n"
    text = date + "You are Step.\nYour instructions begin:\nBe brief.\nSpeak German."
    assert found == [
        "Be brief.\n\nSpeak German.\nNever joke.", "question 0", "answer 0", "question 1" + text, "answer 1",
        "question 2", "answer 2", "last" + text,
    ]  # fmt: skip


def test_a_longer_dialogue_begins_as_the_shorter_one_did():
    """So the prefix cache still holds it."""
    for every in (1, 2, 3):
        before = contents(remind(messages(4)[:-1], Reminder(every=every), TODAY))
        assert contents(remind(messages(5), Reminder(every=every), TODAY))[: len(before)] == before


def test_a_reminder_in_parts_and_of_nothing():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    request = ChatCompletionRequest(model=MODEL, messages=[{"role": "user", "content": parts}])
    (message,) = remind(request.messages, Reminder(every=1), TODAY)
    assert [part.type for part in message.content] == ["text", "image_url"]
    assert message.content[0].text == "a\n\n[Reminder]\nToday is Wednesday, 2026-03-04."
    assert request.messages[0].content[0].text == "a", "the caller's stays"
    assert contents(remind(messages(1), Reminder(every=1, lines=0, date=False))) == contents(messages(1))


def test_a_chat_is_reminded_where_the_server_or_the_request_says_so():
    asked = {"guards": {"reminder": {"every": 1}}}
    for servers, own in ((asked, None), (None, asked)):
        request, _ = chat(servers, custom_params=own)
        assert request.messages[0].content.startswith("Größe?\n\n[Reminder]\nToday is ")
    off, _ = chat(asked, custom_params={"guards": {"reminder": False}})
    assert off.messages[0].content == "Größe?"
