"""Errors as each API's own clients read them."""

import json
from dataclasses import dataclass

MAX_CHARACTERS = 1000  # a message quotes the request, which may be megabytes
MAX_PROBLEMS = 5

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = _OPENAI_TYPES | {413: "request_too_large", 503: "overloaded_error"}


@dataclass(frozen=True)
class Problem:
    """What went wrong with a request."""

    status: int
    message: str
    param: str | None = None


def dialect_of(path: str):
    """The function that renders a Problem for the API at this path, or None for other endpoints."""
    for prefix, render in _DIALECTS.items():
        if path == prefix or path.startswith(prefix.rstrip("/") + "/"):
            return render
    return None


def _native(problem: Problem) -> dict:
    return {"error": {"message": problem.message, "code": problem.status}}


def ollama(problem: Problem) -> dict:
    return {"error": problem.message}


def anthropic(problem: Problem) -> dict:
    kind = "api_error" if problem.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC_TYPES.get(problem.status, kind)
    return {"type": "error", "error": {"type": kind, "message": problem.message}}


def _openai(problem: Problem) -> dict:
    kind = "server_error" if problem.status >= 500 else "invalid_request_error"
    error = {
        "message": problem.message,
        "type": _OPENAI_TYPES.get(problem.status, kind),
        "param": problem.param,
        "code": problem.status,
    }
    # SGLang puts these fields at the top level, where its own clients look for them.
    return {"error": error, "object": "error", **error}


# The first prefix that fits.
_DIALECTS = {"/v1/messages": anthropic, "/v1": _openai, "/api": ollama, "/generate": _native}


def read_problem(status: int, body: bytes) -> Problem:
    """The problem in an error response of SGLang, whatever shape its handler gave it."""
    text = body.decode(errors="replace").strip()
    try:
        found = find_error(json.loads(text))
    except ValueError:
        found = None
    if found is None:
        found = Problem(status, text)
    return Problem(status, readable(found.message) or "Request failed", found.param)


def find_error(payload: object) -> Problem | None:
    """The error that a decoded response or stream event carries, if any."""
    if not isinstance(payload, dict):
        return None
    if payload.get("type") == "response.failed":
        payload = payload.get("response") or {}
    meta = payload.get("meta_info")
    finish = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(finish, dict) and finish.get("type") == "abort" and finish.get("status_code"):
        return Problem(int(finish["status_code"]), str(finish.get("message", "")))
    error = payload.get("error") or payload.get("detail")  # FastAPI's own errors
    if error is None and payload.get("object") == "error":
        error = payload
    if error is None:
        return None
    if not isinstance(error, dict):
        return Problem(400, str(error))
    message = error.get("message") or error.get("detail") or json.dumps(error)
    return Problem(_status(error), str(message), error.get("param"))


def _status(error: dict) -> int:
    code = error.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        return code
    # Without a number, its type tells whose fault it is.
    kind = f"{code or ''} {error.get('type', '')}".lower()
    return 500 if "server" in kind or "api_error" in kind else 400


def readable(message: str) -> str:
    """Without paths of the server's own files, and short."""
    lines = [line for line in message.splitlines() if 'File "' not in line]
    text = "\n".join(lines).strip()
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "…"


def validation_message(errors: list[dict]) -> str:
    """Which fields are wrong and why, without what the request held in them."""
    parts = [_problem_text(error) for error in errors[:MAX_PROBLEMS]]
    if len(errors) > MAX_PROBLEMS:
        parts.append(f"and {len(errors) - MAX_PROBLEMS} more")
    return "; ".join(parts) or "invalid request"


def _problem_text(error: dict) -> str:
    place = [step for step in error.get("loc", ()) if step != "body"]
    message = error.get("msg", "invalid")
    if error.get("type") == "json_invalid":
        return f"{message} at character {place[0]}: {error.get('ctx', {}).get('error')}"
    return f"{'.'.join(map(str, place))}: {message}" if place else message
