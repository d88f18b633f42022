"""Gives every failed request a status of its own and an error in its API's format.

SGLang 0.5.23 answers some failures with another API's error, with plain text, or, when a
stream was asked for, with status 200 and an error event, which the clients' libraries take for
a success. The start of a stream is therefore held back until its first content or error.
"""

import json
import logging
import traceback
from dataclasses import replace

from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from sglang_step35.http.admission import CLOSING, REFUSED
from sglang_step35.http.errors import (
    Problem,
    anthropic,
    dialect_of,
    find_error,
    ollama,
    read_problem,
    readable,
    validation_message,
)
from sglang_step35.http.guards import servers_params
from sglang_step35.http.size import PROBLEM, TOO_LARGE, declares_too_much, drain, limited

logger = logging.getLogger(__name__)

STREAMS = ("text/event-stream", "application/x-ndjson")
# Events that come before anything is known of the request's fate.
OPENING = {"message_start", "ping", "response.created", "response.queued", "response.in_progress"}


def install(_result=None, server_args=None) -> None:
    """After SGLang's last step before it starts the HTTP server: the app is complete by then.

    Every API reports the prompt tokens that the prefix cache held, as with `--enable-cache-report`.
    """
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.runtime_context import get_context, get_serving

    get_context().override("sglang_step35.http", enable_cache_report=True)
    servers_params(get_serving().preferred_sampling_params)  # what it cannot be should not wait for a request
    if any(entry.cls is ErrorFormat for entry in app.user_middleware):
        return
    app.add_middleware(ErrorFormat)
    stock = app.exception_handlers[RequestValidationError]

    async def invalid(request: Request, error: RequestValidationError):
        if _dialect(request.scope) is None:
            return await stock(request, error)
        message = validation_message(error.errors())
        return JSONResponse({"error": {"message": message}}, status_code=400)

    app.add_exception_handler(RequestValidationError, invalid)


def _dialect(scope):
    return dialect_of(scope["path"].removeprefix(scope.get("root_path", "")))


class ErrorFormat:
    """ASGI middleware around the whole application."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        dialect = _dialect(scope) if scope["type"] == "http" else None
        if dialect is None or scope["method"] == "HEAD":
            await self.app(scope, receive, send)
            return
        if dialect is ollama:  # which reads JSON whatever its type is called, as `curl -d` does
            others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        if dialect is anthropic:
            scope = _bearing_its_key(scope)
        reply = _Reply(send, dialect, scope)
        if declares_too_much(scope):
            await drain(receive)
            await reply.fail(PROBLEM)
            return
        try:
            await self.app(scope, limited(receive, scope), reply)
        except Exception as error:
            if reply.started:
                raise
            await reply.fail(_problem(error))


def _bearing_its_key(scope):
    """With the key where SGLang looks for it: Anthropic's clients send `x-api-key`."""
    headers = dict(scope["headers"])
    if b"x-api-key" not in headers or b"authorization" in headers:
        return scope
    return {**scope, "headers": [*scope["headers"], (b"authorization", b"Bearer " + headers[b"x-api-key"])]}


def _problem(error: Exception) -> Problem:
    # Validators of SGLang's request classes read a body before its types are checked.
    frames = traceback.walk_tb(error.__traceback__)
    if any(frame.f_code.co_name == "request_body_to_args" for frame, _ in frames):
        return Problem(400, f"The body is not what this endpoint expects ({error})")
    logger.error("Request failed", exc_info=error)
    return Problem(500, "Internal server error")


class _Reply:
    """`send` of one request: passes a good response on, turns a failed one into an error."""

    def __init__(self, send, dialect, scope):
        self._send = send
        self._dialect = dialect
        self._scope = scope
        self._start: dict | None = None  # held back
        self._body = b""
        self.started = False
        self._failed = False

    async def __call__(self, message: dict) -> None:
        if self._failed:  # the rest of a stream that was an error
            return
        if message["type"] == "http.response.start" and self._holds(message):
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            self.started = True
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            await self._judge(final=not message.get("more_body", False), message=message)

    @staticmethod
    def _holds(start: dict) -> bool:
        return start["status"] >= 400 or _content_type(start).startswith(STREAMS)

    async def _judge(self, final: bool, message: dict) -> None:
        status = self._start["status"]
        if status >= 400:
            if final:
                await self.fail(read_problem(status, self._body))
            return
        problem, content = _look(self._body)
        if problem is not None:
            await self.fail(problem)
        elif content or final:
            start, self._start = self._start, None
            self.started = True
            await self._send(start)
            await self._send({**message, "body": self._body})

    async def fail(self, problem: Problem) -> None:
        """Answer with this error; nothing has been sent yet."""
        self.started = self._failed = True
        if self._scope.get(TOO_LARGE):
            problem = PROBLEM
        elif (refused := self._scope.get(REFUSED)) and (problem.status >= 500 or refused == CLOSING):
            problem = replace(problem, status=refused)
        body = json.dumps(self._dialect(problem)).encode()
        kept = [] if self._start is None else self._start["headers"]
        ours = {b"content-type": b"application/json", b"content-length": str(len(body)).encode()}
        headers = [pair for pair in kept if pair[0].lower() not in ours] + list(ours.items())
        start = {"type": "http.response.start", "status": problem.status, "headers": headers}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def _content_type(start: dict) -> str:
    for name, value in start.get("headers", ()):
        if name.lower() == b"content-type":
            return value.decode("latin-1")
    return ""


def _look(body: bytes) -> tuple[Problem | None, bool]:
    """The error among a stream's first events, and whether there is content before it."""
    for line in body.splitlines():
        line = line.removeprefix(b"data:").strip()
        if not line or line.startswith((b"event:", b":")):
            continue
        try:
            event = json.loads(line)
        except ValueError:
            return None, line == b"[DONE]"  # or an event that has not arrived whole
        problem = find_error(event)
        if problem is not None:
            return Problem(problem.status, readable(problem.message), problem.param), False
        if not _opens(event):
            return None, True
    return None, False


def _opens(event: object) -> bool:
    if not isinstance(event, dict):
        return False
    if event.get("type") in OPENING:
        return True
    choices = [choice for choice in event.get("choices") or () if isinstance(choice, dict)]
    return bool(choices) and all(_names_the_role(choice) for choice in choices)


def _names_the_role(choice: dict) -> bool:
    """The chat endpoint's first chunk: a role and nothing else."""
    delta = choice.get("delta")
    if not isinstance(delta, dict) or choice.get("finish_reason"):
        return False
    return not any(value for key, value in delta.items() if key != "role")
