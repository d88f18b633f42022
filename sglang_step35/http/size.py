"""A limit on what a request may send, held before any of it is parsed."""

from sglang_step35.http.errors import Problem

MAX_BODY = 32 << 20  # bytes: what Anthropic's Messages API takes; 256K tokens of text are 1 to 2 MiB
TOO_LARGE = "sglang_step35.too_large"  # in an ASGI scope: this request was
PROBLEM = Problem(413, f"The body is larger than {MAX_BODY >> 20} MiB")


class BodyTooLarge(Exception):
    """Raised to whoever reads the body; what comes of it there is replaced by `PROBLEM`."""


def declares_too_much(scope) -> bool:
    """Whether the request's Content-Length is above the limit."""
    declared = dict(scope["headers"]).get(b"content-length", b"")
    return declared.isdigit() and int(declared) > MAX_BODY


def limited(receive, scope):
    """`receive` of one request, which ends with BodyTooLarge past the limit: a chunked body declares no length."""
    taken = 0

    async def counted():
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_BODY:
            scope[TOO_LARGE] = True
            raise BodyTooLarge
        return message

    return counted


async def drain(receive) -> None:
    """Read what a client still sends, so that it reads its answer; past the limit again it finds the line closed."""
    left = MAX_BODY
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return
