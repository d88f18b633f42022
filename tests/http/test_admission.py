"""admission.py: what a request may ask, at each boundary and just past it."""

import asyncio
from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from sglang_step35.http.admission import REFUSED, admit, generate
from tests.http.fakes import VOCABULARY, tokenizer_manager

MANAGER = tokenizer_manager()
LAST = VOCABULARY - 1


def ask(sampling: object = None, **fields) -> None:
    """Admit a request as the endpoints hand it over; one prompt unless the fields name others."""
    prompt = {} if {"text", "input_ids"} & fields.keys() else {"text": "def größe("}
    admit(MANAGER, GenerateReqInput(**prompt, sampling_params=sampling or {}, **fields))


GOOD_SAMPLING = [
    {},
    {"temperature": 0, "top_p": 1, "min_p": 0.5, "frequency_penalty": -2, "presence_penalty": 2.0},
    {"temperature": None, "stop": None, "logit_bias": None, "n": None, "stop_token_ids": None},
    {"max_new_tokens": 0, "min_new_tokens": 0},
    {"max_new_tokens": 2**31 - 1},
    {"n": 1},
    {"n": 1024},
    {"top_k": -1},
    {"top_k": 2**31 - 1},
    {"stream_interval": 1},
    {"sampling_seed": 2**63 - 1},
    {"sampling_seed": -(2**63)},
    {"stop_token_ids": [0, LAST]},
    {"stop_token_ids": []},
    {"logit_bias": {"5": -100, "6": 100.0}},
    {"logit_bias": {"5": 3.4e38}},
    {"stop": "ende"},
    {"stop": ["ende", "終"]},
    {"stop_regex": "a{1,9}"},
    {"stop_regex": ["[ab]", "終+"]},
    {"json_schema": '{"type": "object"}'},
    {"regex": "(a|b)"},
    {"ebnf": 'root ::= "a"'},
    {"custom_params": {"a": [1, 2]}},
    {"custom_params": {"speculative_depth": 0}},
]


@pytest.mark.parametrize("sampling", GOOD_SAMPLING)
def test_sampling_within_its_bounds_is_admitted(sampling):
    ask(sampling)


BAD_SAMPLING = [
    ({"max_new_tokens": "8"}, "max_new_tokens"),
    ({"max_new_tokens": 1.5}, "max_new_tokens"),
    ({"max_new_tokens": 2**31}, "max_new_tokens is out of range"),
    ({"min_new_tokens": 2**31}, "min_new_tokens is out of range"),
    ({"min_new_tokens": -(2**31) - 1}, "min_new_tokens is out of range"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("nan")}, "temperature is out of range"),
    ({"temperature": float("inf")}, "temperature is out of range"),
    ({"frequency_penalty": -1e300}, "frequency_penalty is out of range"),
    ({"n": 0}, r"n must be an integer in \[1, 1024\], got 0"),
    ({"n": 1025}, r"n must be an integer in \[1, 1024\], got 1025"),
    ({"n": True}, "sampling_params"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": -2, "temperature": 0}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"stream_interval": 0}, "stream_interval"),
    ({"sampling_seed": 2**63}, "sampling_seed is out of range|int64|range"),
    ({"sampling_seed": -(2**63) - 1}, "sampling_seed is out of range|int64|range"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids must be an integer in"),
    ({"stop_token_ids": [-1]}, "stop_token_ids must be an integer in"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"logit_bias": {"5": "much"}}, "logit_bias"),
    ({"logit_bias": {"5": 1e300}}, "logit_bias is out of range"),
    ({"logit_bias": {"5": float("nan")}}, "logit_bias is out of range"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop": 7}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop_regex": "("}, "stop_regex"),
    ({"stop_regex": ["a", "["]}, "stop_regex"),
    ({"json_schema": {"type": "object"}}, "json_schema"),
    ({"regex": 5}, "regex"),
    ({"ebnf": ["root"]}, "ebnf"),
    ({"ignore_eos": "perhaps"}, "ignore_eos"),
    ({"custom_params": {"speculative_depth": -1}}, "custom_params: speculative_depth must be an integer in"),
    ({"custom_params": {"speculative_depth": 0.5}}, "custom_params: speculative_depth must be an integer in"),
    ({"custom_params": {"speculative_depth": None}}, "custom_params: speculative_depth must be an integer in"),
    ({"no_such_parameter": 1}, "no_such_parameter"),
    ({"is_normalized": True}, "is_normalized"),
    ({"stop_strs": ["a"]}, "stop_strs"),
    ({"stop_str_max_len": 5}, "stop_str_max_len"),
]


@pytest.mark.parametrize(("sampling", "message"), BAD_SAMPLING)
def test_sampling_past_its_bounds_is_refused_by_name(sampling, message):
    with pytest.raises(ValueError, match=message) as caught:
        ask(sampling)
    assert "$" not in str(caught.value)


@pytest.mark.parametrize("sampling", ["flat", 5, True, ["flat"], [[1]]])
def test_sampling_params_are_objects(sampling):
    with pytest.raises(ValueError, match="sampling_params must be"):
        ask(sampling)


GOOD_FIELDS = [
    {"top_logprobs_num": 0, "return_logprob": True},
    {"top_logprobs_num": VOCABULARY},
    {"logprob_start_len": -1},
    {"logprob_start_len": 2**31 - 1},
    {"rid": "anfrage-ü"},
    {"session_params": {"id": "a", "rid": None, "offset": 3, "replace": True}},
    {"session_params": {}},
    {"input_ids": [0, LAST]},
    {"input_ids": array("q", [1, LAST])},
    {"input_ids": [[0], [LAST, 1]]},
    {"positional_embed_overrides": SimpleNamespace()},
    {"positional_embed_overrides": [None, SimpleNamespace()]},
]


@pytest.mark.parametrize("fields", GOOD_FIELDS)
def test_fields_within_their_bounds_are_admitted(fields):
    ask(**fields)


BAD_FIELDS = [
    ({"top_logprobs_num": -1}, "top_logprobs_num must be an integer in"),
    ({"top_logprobs_num": VOCABULARY + 1}, "top_logprobs_num must be an integer in"),
    ({"top_logprobs_num": True}, "top_logprobs_num must be an integer in"),
    ({"logprob_start_len": -2}, "logprob_start_len must be an integer in"),
    ({"logprob_start_len": 2**31}, "logprob_start_len must be an integer in"),
    ({"rid": 5}, "rid must be a string"),
    ({"rid": {"a": 1}}, "rid must be a string"),
    ({"session_params": {"no_such": 1}}, "session_params: .*no_such"),
    ({"positional_embed_overrides": {}}, "cannot be given as JSON"),
    ({"positional_embed_overrides": [{"a": 1}]}, "cannot be given as JSON"),
    ({"positional_embed_overrides": "a"}, "cannot be given as JSON"),
    ({"text": ""}, "the prompt is empty"),
    ({"text": []}, "the prompt is empty"),
    ({"text": ["a", ""]}, "the prompt is empty"),
    ({"text": ["a", 5]}, "a prompt must be a string, got int"),
    ({"text": "\ud800"}, "not valid Unicode"),
    ({"text": ["ü", "\ud800"]}, "not valid Unicode"),
    ({"input_ids": [VOCABULARY]}, r"token ids must be in \[0, 100\)"),
    ({"input_ids": [-1]}, r"token ids must be in \[0, 100\)"),
    ({"input_ids": [[1], [VOCABULARY]]}, r"token ids must be in \[0, 100\)"),
    ({"input_ids": [[1], []]}, "the prompt is empty"),
    ({"input_ids": [10**30]}, "token ids must be integers"),
    ({"input_ids": [1.5]}, "token ids must be integers"),
    ({"input_ids": ["a"]}, "token ids must be integers"),
    ({"input_ids": [1, "a"]}, "token ids must be integers"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS)
def test_fields_past_their_bounds_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ask(**fields)


def test_long_values_are_not_quoted_whole():
    with pytest.raises(ValueError) as caught:
        ask(top_logprobs_num="x" * 10_000)
    assert len(str(caught.value)) < 200


BATCH_VALUES = {
    "return_logprob": [True, False],
    "top_logprobs_num": [1, 2],
    "logprob_start_len": [-1, 0],
    "rid": ["a", "b"],
    "sampling_params": [{"n": 1}, {"top_k": 5}],
}


@pytest.mark.parametrize(("name", "values"), BATCH_VALUES.items())
@pytest.mark.parametrize("prompts", [{"text": ["a", "ü"]}, {"input_ids": [[1], [2]]}])
def test_a_batch_takes_one_value_or_one_for_each_prompt(name, values, prompts):
    admit(MANAGER, GenerateReqInput(**{"sampling_params": {}, **prompts, name: values}))
    admit(MANAGER, GenerateReqInput(**{"sampling_params": {}, **prompts, name: values[0]}))
    for wrong in (values[:1], [*values, values[0]]):
        with pytest.raises(ValueError, match=f"{name} must be one value"):
            admit(MANAGER, GenerateReqInput(**{"sampling_params": {}, **prompts, name: wrong}))


@pytest.mark.parametrize("name", BATCH_VALUES)
@pytest.mark.parametrize("prompt", [{"text": "a"}, {"input_ids": [1, 2]}])
def test_a_single_prompt_takes_no_list(name, prompt):
    with pytest.raises(ValueError, match=f"{name} must be one value"):
        admit(MANAGER, GenerateReqInput(**{"sampling_params": {}, **prompt, name: BATCH_VALUES[name]}))


def test_every_request_of_a_batch_is_checked():
    for second in ({"n": 0}, {"stop_token_ids": [VOCABULARY]}):
        with pytest.raises(ValueError):
            ask([{}, second], text=["a", "b"])
    with pytest.raises(ValueError, match="top_logprobs_num"):
        ask(text=["a", "b"], top_logprobs_num=[1, VOCABULARY + 1])


def answers(
    *outputs, obj: object = None, raised: Exception | None = None, manager=MANAGER
) -> tuple[list, dict, list[str]]:
    """What `generate` yields around a door that gives these outputs, the scope, and what happened at the door."""
    events: list[str] = []

    async def stock(manager, obj, request):
        events.append("opened")
        try:
            for output in outputs:
                yield output
            if raised:
                raise raised
        finally:
            events.append("closed")

    request, found = SimpleNamespace(scope={}), []

    async def drain() -> None:
        async for output in generate(stock, manager, obj or GenerateReqInput(text="a", sampling_params={}), request):
            found.append(output)

    error = None
    try:
        asyncio.run(drain())
    except Exception as caught:
        error = caught
    return found, request.scope | ({"error": error} if error else {}), events


def output(kind: str, status: int | None = None) -> dict:
    return {"text": "ü", "meta_info": {"finish_reason": {"type": kind, "status_code": status, "message": "zu lang"}}}


def test_outputs_pass_in_order():
    running = {"text": "a", "meta_info": {"finish_reason": None}}
    found, scope, events = answers(running, output("stop"))
    assert found == [running, output("stop")] and scope == {} and events == ["opened", "closed"]


def test_a_refused_request_never_reaches_the_scheduler_and_is_marked():
    found, scope, events = answers(obj=GenerateReqInput(text="a", sampling_params={"n": 0}))
    assert found == events == [] and scope[REFUSED] == 400 and isinstance(scope["error"], ValueError)


def test_a_server_that_is_shutting_down_begins_nothing_new():
    closing = tokenizer_manager()
    closing.gracefully_exit = True
    found, scope, events = answers(output("stop"), manager=closing)
    assert found == events == [] and scope[REFUSED] == 503
    assert "shutting down" in str(scope["error"])


def test_what_the_scheduler_refuses_raises_at_its_first_output():
    found, scope, events = answers(output("abort", 400))
    assert found == [] and scope[REFUSED] == 400 and events == ["opened", "closed"]
    assert str(scope["error"]) == "zu lang"


@pytest.mark.parametrize("outputs", [[output("abort", 503)], [output("abort")], [output("stop"), output("abort", 400)]])
def test_other_aborts_are_outputs(outputs):
    assert answers(*outputs)[:2] == (outputs, {})


def test_only_refusals_are_marked_as_such():
    assert answers(raised=ValueError("input is too long"))[1][REFUSED] == 400
    assert REFUSED not in answers(raised=RuntimeError("it broke"))[1]


def test_batches_and_other_outputs_are_no_refusals():
    assert answers([output("abort", 400)])[0] == [[output("abort", 400)]]


def test_embedding_requests_are_not_checked_as_generation():
    found, scope, _ = answers({"embedding": [1.0]}, obj=EmbeddingReqInput(text="", sampling_params={}))
    assert found == [{"embedding": [1.0]}] and scope == {}


def test_a_client_that_leaves_closes_the_door():
    events = []

    async def stock(manager, obj, request):
        try:
            while True:
                yield {"text": "a"}
        finally:
            events.append("closed")

    async def leave() -> None:
        outputs = generate(stock, MANAGER, GenerateReqInput(text="a", sampling_params={}))
        await anext(outputs)
        await outputs.aclose()
        assert events == ["closed"]

    asyncio.run(leave())


@pytest.mark.parametrize("field", ["image_data", "video_data", "audio_data"])
def test_a_text_model_refuses_what_is_no_text(field):
    with pytest.raises(ValueError, match="takes text only: remove image_data"):
        ask(**{field: "data:image/png;base64,AAAA"})
    ask(**{field: []})
    multimodal = SimpleNamespace(vocab_size=VOCABULARY, is_multimodal=True)
    admit(SimpleNamespace(**vars(MANAGER) | {"model_config": multimodal}), GenerateReqInput(text="a", image_data="a"))
