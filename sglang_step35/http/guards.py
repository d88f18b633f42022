"""Guards on their way in: the server's, the request's, and what other fields of the APIs ask of them.

The server's are those of SGLang's `--preferred-sampling-params '{"custom_params": {"guards": {...}}}'`. Of each guard
the request's own counts, then what its API's field says, then the server's.
"""

import json

from sglang_step35 import names
from sglang_step35.guards import settings
from sglang_step35.http.reminder import remind
from sglang_step35.names import GUARDS_PARAM

# Tokens of thinking by OpenAI's `reasoning_effort` and Ollama's `think`; the other levels are not limited.
EFFORTS = {"none": 0, "minimal": 1024, "low": 4096, "medium": 16384}


def servers_params(preferred: dict | None) -> dict:
    """The server's `custom_params`; raises GuardError for what its guards may not be."""
    custom = (preferred or {}).get("custom_params") or {}
    if GUARDS_PARAM in custom:
        settings.parse(custom[GUARDS_PARAM])
    return custom


def add_servers_params(manager, params: dict) -> None:
    """Make a request's `custom_params` whole: with the server's, of guards each by itself.

    SGLang leaves out all of the server's where a request names any, and guards travel to the scheduler as text, because
    nothing nested does.
    """
    servers = servers_params(manager.preferred_sampling_params)
    own = params.get("custom_params")
    if (own is not None and not isinstance(own, dict)) or not (servers or own):
        return  # refused elsewhere, or nothing to add
    whole = servers | (own or {})
    guards = merged(servers.get(GUARDS_PARAM), (own or {}).get(GUARDS_PARAM))
    if guards is not None:
        settings.parse(guards)
        whole = whole | {GUARDS_PARAM: json.dumps(guards)}
    params["custom_params"] = whole


def merged(*layers: object) -> dict | None:
    """Guards of which each comes from the last layer that names it; None where no layer names any."""
    given = [settings.as_object(layer) for layer in layers if layer is not None]
    return {name: value for layer in given for name, value in layer.items()} if given else None


def to_internal_request(stock, serving, request, raw_request=None):
    """Around `OpenAIServingChat._convert_to_internal_request`, through which chats of every API go."""
    manager = serving.tokenizer_manager
    if not names.is_ours(manager.model_config.hf_config):
        return stock(serving, request, raw_request)
    budget = EFFORTS.get(request.reasoning_effort)
    effort = None if budget is None else {"reasoning": {"tokens": budget}}
    custom = request.custom_params or {}
    asked = merged(effort, custom.get(GUARDS_PARAM))
    if asked is not None:
        request.custom_params = custom | {GUARDS_PARAM: asked}
    servers = servers_params(manager.preferred_sampling_params)
    guards = settings.parse(merged({}, servers.get(GUARDS_PARAM), asked))
    if guards.reminder:
        request.messages = remind(request.messages, guards.reminder)
    adapted, request = stock(serving, request, raw_request)
    if budget == 0:
        # The template opens `<think>` all the same; a grammar has to let it be closed.
        adapted.require_reasoning = True
    return adapted, request
