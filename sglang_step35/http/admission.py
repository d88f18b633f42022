"""Checks a request passes before the scheduler sees it.

SGLang's HTTP layer checks what its protocol classes declare, but not the inside of
`sampling_params`, nor sizes: `logprobs` beyond the vocabulary, `top_k` beyond 32 bits or a text
as `max_new_tokens` reach the scheduler, where an exception ends the server for all its users.
"""

import re
from array import array
from contextlib import aclosing
from functools import cache
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import GenerateReqInput, SessionParams

from sglang_step35.http.guards import add_servers_params
from sglang_step35.names import DEPTH_PARAM

REFUSED = "sglang_step35.refused"  # key of the ASGI scope: the status of a refusal
CLOSING = 503
MAX_SAMPLES = 1024  # of one prompt: each is a request of its own, made before the first one runs
INT32, INT64, FLOAT32 = 2**31, 2**63, 3.4e38
# Filled by SGLang itself while it normalizes; from outside they would skip that.
_INTERNAL = {
    "stop_strs",
    "stop_regex_strs",
    "stop_str_max_len",
    "stop_regex_max_len",
    "is_normalized",
}
_JSON = (dict, list, str, int, float)
_BY_PROMPT = ("return_logprob", "top_logprobs_num", "logprob_start_len", "rid", "sampling_params")


async def generate(stock, manager, obj, request=None):
    """Around `TokenizerManager.generate_request`, the one door to the scheduler."""
    status = 400
    try:
        if manager.gracefully_exit:
            # Stock serves it until the last request is done, so a busy server never ends; one that comes between the
            # last look and the scheduler's end would never be answered.
            status = CLOSING
            raise ValueError("this server is shutting down: send the request again, here later or to another replica")
        if isinstance(obj, GenerateReqInput):
            admit(manager, obj)
        async with aclosing(stock(manager, obj, request)) as outputs:
            first = True
            async for output in outputs:
                if first:
                    _raise_refusal(output)
                    first = False
                yield output
    except ValueError:
        # Some endpoints report a refusal as their own failure; the middleware knows better.
        if request is not None:
            request.scope[REFUSED] = status
        raise


def _raise_refusal(output: object) -> None:
    """What the scheduler refuses raises, also where a stream was asked for."""
    meta = output.get("meta_info", {}) if isinstance(output, dict) else {}
    finish = meta.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        if finish.get("status_code") == 400:
            raise ValueError(finish.get("message", "the request was refused"))


def admit(manager, obj: GenerateReqInput) -> None:
    """Raise ValueError for what no request may ask."""
    vocabulary = manager.model_config.vocab_size
    if obj.contains_mm_input() and not manager.model_config.is_multimodal:
        # Without a processor SGLang would answer as if the picture were not there.
        raise ValueError("this model takes text only: remove image_data, video_data and audio_data")
    _check_text(obj.text)
    _check_ids(obj.input_ids, vocabulary)
    _check_lists(obj)
    if any(not isinstance(rid, str) for rid in _each(obj.rid)):
        raise ValueError("rid must be a string or a list of strings")
    if obj.session_params:
        _check_session(obj.session_params)
    if any(isinstance(item, _JSON) for item in _each(obj.positional_embed_overrides)):
        raise ValueError("positional_embed_overrides cannot be given as JSON")
    for count in _each(obj.top_logprobs_num):
        _check_range("top_logprobs_num", count, 0, vocabulary)
    for start in _each(obj.logprob_start_len):
        _check_range("logprob_start_len", start, -1, INT32 - 1)
    if obj.sampling_params is None:
        obj.sampling_params = {}
    for params in _each(obj.sampling_params):
        if isinstance(params, dict):
            add_servers_params(manager, params)
        check_sampling(params, manager.sampling_params_class)
        for token in _each(params.get("stop_token_ids")):
            # min_new_tokens indexes the logits with them.
            _check_range("sampling_params: stop_token_ids", token, 0, vocabulary - 1)


def _check_lists(obj: GenerateReqInput) -> None:
    """One value for each prompt, and lists only beside a list of prompts."""
    prompts = obj.text if obj.text is not None else obj.input_ids
    if not prompts:
        return
    batch = None if isinstance(prompts, str) or isinstance(prompts[0], int) else len(prompts)
    for name in _BY_PROMPT:
        values = getattr(obj, name)
        if isinstance(values, list) and len(values) != batch:
            raise ValueError(f"{name} must be one value, or one for each prompt of a batch")


def check_sampling(params: object, params_class: type) -> None:
    """Types as the class of the scheduler declares them, and integers that tensors can hold."""
    if not isinstance(params, dict):
        raise ValueError(f"sampling_params must be an object, got {type(params).__name__}")
    given = {name: value for name, value in params.items() if value is not None}
    try:
        msgspec.convert(given, _declared(params_class))
    except msgspec.ValidationError as error:
        raise ValueError(f"sampling_params: {error}".replace("$.", "")) from error
    for name, value in given.items():
        for number in value.values() if isinstance(value, dict) else _each(value):
            if not _fits(number, INT64 if name == "sampling_seed" else INT32):
                raise ValueError(f"sampling_params: {name} is out of range")
    _check_range("n", given.get("n"), 1, MAX_SAMPLES)
    _check_range("stream_interval", given.get("stream_interval"), 1, INT32 - 1)
    custom = given.get("custom_params", {})
    if DEPTH_PARAM in custom:
        _check_range(f"custom_params: {DEPTH_PARAM}", custom[DEPTH_PARAM], 0, INT32 - 1, may_be_absent=False)
    # With temperature 0 SGLang overwrites top_k before it looks at it.
    _check_range("top_k", given.get("top_k"), -1, INT32 - 1)
    for pattern in _each(given.get("stop_regex")):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"sampling_params: stop_regex: {error}") from error


def _fits(number: object, integers: int) -> bool:
    if isinstance(number, int):
        return -integers <= number < integers
    return not isinstance(number, float) or abs(number) <= FLOAT32  # false for NaN


def _check_session(params: object) -> None:
    try:
        SessionParams(**params)
    except TypeError as error:
        raise ValueError(f"session_params: {error}") from error


@cache
def _declared(params_class: type) -> type:
    """A struct with the fields a client may set, each with its declared type, and no others."""
    fields = [
        # The watermark's own class reads and checks it.
        (field.name, Any if field.name == "watermark" else field.type, None)
        for field in msgspec.structs.fields(params_class)
        if field.name not in _INTERNAL
    ]
    return msgspec.defstruct("sampling_params", fields, kw_only=True, forbid_unknown_fields=True)


def _each(value: object) -> list:
    """What a field holds for every request of a batch; None leaves it to its default."""
    values = value if isinstance(value, list | set | tuple) else [value]
    return [item for item in values if item is not None]


def _check_range(name: str, value: object, low: int, high: int, may_be_absent: bool = True) -> None:
    if value is None and may_be_absent:
        return
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {str(value)[:80]}")


def _check_text(text: object) -> None:
    for item in [text] if isinstance(text, str) else text or ():
        if not isinstance(item, str):
            raise ValueError(f"a prompt must be a string, got {type(item).__name__}")
        if not item:
            raise ValueError("the prompt is empty")
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not valid Unicode: {error.reason}") from error
    if text is not None and len(text) == 0:
        raise ValueError("the prompt is empty")


def _check_ids(ids: object, vocabulary: int) -> None:
    if not ids:
        return
    batch = ids if isinstance(ids[0], list | tuple | array) else [ids]
    for row in batch:
        try:
            row = array("q", row)
        except (TypeError, OverflowError) as error:
            raise ValueError("token ids must be integers of the vocabulary") from error
        if len(row) == 0:
            raise ValueError("the prompt is empty")
        if min(row) < 0 or max(row) >= vocabulary:
            raise ValueError(f"token ids must be in [0, {vocabulary})")
