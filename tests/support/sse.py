"""Lines of a streamed chat answer, as OpenAI-compatible servers send them."""

import json


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n"


def delta(**fields) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": None}])


FINISH = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
DONE = b"data: [DONE]\n"
