"""middleware.py: statuses and error formats of whole responses and of streams, through plain ASGI apps."""

import asyncio
import json
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from sglang_step35.http.admission import CLOSING, REFUSED
from sglang_step35.http.middleware import ErrorFormat
from tests.http.fakes import DONE, chunk, event

CHAT, CLAUDE, OLLAMA, RESPONSES = "/v1/chat/completions", "/v1/messages", "/api/chat", "/v1/responses"
SSE, LINES = "text/event-stream; charset=utf-8", "application/x-ndjson"
ROLE = chunk(role="assistant", content="", reasoning_content=None)
REFUSAL = event(error={"object": "error", "message": "top_p is wrong", "type": "BadRequestError", "code": 400})


def answering(*pieces: str | bytes, status: int = 200, kind: str = SSE, **headers: str) -> Callable:
    """An app that sends these pieces one by one."""
    pairs = [(b"content-type", kind.encode())]
    pairs += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        for piece in pieces:
            body = piece if isinstance(piece, bytes) else piece.encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


def post(app: Callable, path: str = CHAT, **more):
    client = TestClient(ErrorFormat(app), raise_server_exceptions=False)
    return client.post(path, **{"json": {}} | more)


def sent(app: Callable, path: str = CHAT, **scope) -> list[dict]:
    """The ASGI messages that reach the client."""
    found: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": b""}

    async def send(message: dict) -> None:
        found.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], **scope}
    asyncio.run(ErrorFormat(app)(scope, receive, send))
    return found


def bodies(messages: list[dict]) -> list[str]:
    return [message["body"].decode() for message in messages if message.get("body")]


def test_a_good_stream_arrives_unchanged_and_piece_by_piece():
    pieces = [ROLE, chunk(content="Größe"), chunk(content=" 5"), DONE]
    messages = sent(answering(*pieces))
    assert messages[0]["status"] == 200
    assert bodies(messages) == [ROLE + pieces[1], pieces[2], DONE]


def test_the_first_content_is_not_held_back():
    """The app sends no second piece before the client has the first."""
    seen = []

    async def app(scope, receive, send):
        await answering()(scope, receive, lambda message: send(message | {"more_body": True}))
        await send({"type": "http.response.body", "body": chunk(content="a").encode(), "more_body": True})
        seen.append(list(found))

    found: list[dict] = []

    async def send(message: dict) -> None:
        found.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(ErrorFormat(app)(scope, None, send))
    assert bodies(seen[0]) == [chunk(content="a")]


@pytest.mark.parametrize(
    ("path", "opening"),
    [
        (CHAT, []),
        (CHAT, [ROLE]),
        (CHAT, [": keep-alive\n\n", ROLE]),
        (CLAUDE, [event(type="message_start", message={}), event(type="ping")]),
        (CLAUDE, ["event: message_start\n", event(type="message_start", message={})]),
        (RESPONSES, [event(type="response.created"), event(type="response.in_progress")]),
        (RESPONSES, [event(type="response.queued")]),
    ],
)
def test_an_error_at_the_start_of_a_stream_is_an_error_response(path, opening):
    response = post(answering(*opening, REFUSAL, DONE), path)
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.json()["error"]["message"] == "top_p is wrong"
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_nothing_of_a_stream_follows_its_error_response():
    messages = sent(answering(REFUSAL, chunk(content="a"), REFUSAL, DONE))
    assert [message["type"] for message in messages] == ["http.response.start", "http.response.body"]


def test_an_error_split_over_two_pieces_is_still_one():
    response = post(answering(REFUSAL[:30], REFUSAL[30:], DONE))
    assert response.status_code == 400 and response.json()["error"]["message"] == "top_p is wrong"


def test_a_character_split_over_two_pieces_arrives_whole():
    text = chunk(content="日本").encode()
    cut = text.index("本".encode()) + 1
    assert post(answering(text[:cut], text[cut:], DONE)).text == chunk(content="日本") + DONE


@pytest.mark.parametrize(
    "content",
    [
        chunk(content="a"),
        chunk(reasoning_content="a", content=None),
        chunk(role="assistant", content="a"),
        chunk(tool_calls=[{"index": 0}]),
        chunk(finish="stop"),
        event(choices=[], usage={"prompt_tokens": 1}),
        event(type="content_block_start", index=0),
        event(text="a", meta_info={"finish_reason": None}),
    ],
)
def test_an_error_after_content_stays_in_the_stream(content):
    messages = sent(answering(content, REFUSAL, DONE))
    assert messages[0]["status"] == 200
    assert bodies(messages) == [content, REFUSAL, DONE]


@pytest.mark.parametrize("pieces", [[], [ROLE], [DONE], [ROLE, DONE], ["event: ping\n\n"]])
def test_a_stream_without_content_ends_as_it_is(pieces):
    response = post(answering(*pieces))
    assert (response.status_code, response.text) == (200, "".join(pieces))


def test_ollamas_lines_are_read_like_events():
    refusal = json.dumps({"error": "top_p is wrong"}) + "\n"
    refused = post(answering(refusal, kind=LINES), OLLAMA)
    assert (refused.status_code, refused.json()) == (400, {"error": "top_p is wrong"})
    line = json.dumps({"message": {"role": "assistant", "content": "a"}, "done": False}) + "\n"
    assert post(answering(line, refusal, kind=LINES), OLLAMA).text == line + refusal


def test_a_scheduler_abort_at_the_start_of_generate_gets_its_status():
    finish = {"type": "abort", "status_code": 503, "message": "The queue is full"}
    response = post(answering(event(text="", meta_info={"finish_reason": finish})), "/generate")
    assert response.status_code == 503
    assert response.json() == {"error": {"message": "The queue is full", "code": 503}}


def test_a_failed_response_event_gets_its_status():
    failed = event(type="response.failed", response={"error": {"code": "server_error", "message": "it broke"}})
    response = post(answering(event(type="response.created"), failed), RESPONSES)
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")


@pytest.mark.parametrize("status", [400, 401, 404, 405, 422, 429, 500, 503])
@pytest.mark.parametrize("path", [CHAT, CLAUDE, OLLAMA, "/generate"])
def test_failed_responses_keep_their_status_in_the_apis_format(path, status):
    response = post(answering('{"det', 'ail": "Nein"}', status=status, kind="application/json"), path)
    assert response.status_code == status
    found = response.json()["error"]
    assert (found if path == OLLAMA else found["message"]) == "Nein"
    assert (response.json().get("type") == "error") == (path == CLAUDE)


def test_headers_of_a_failed_response_are_kept_but_not_its_length():
    response = post(answering("no", status=405, kind="text/plain", allow="POST", retry_after="3", content_length="2"))
    assert (response.headers["allow"], response.headers["retry-after"]) == ("POST", "3")
    assert response.headers.get_list("content-type") == ["application/json"]
    assert response.headers.get_list("content-length") == [str(len(response.content))]


def test_good_responses_pass_whatever_they_say():
    body = '{"error": "of a program that the model explains"}'
    response = post(answering(body, kind="application/json", x_request="7"))
    assert (response.status_code, response.text, response.headers["x-request"]) == (200, body, "7")


@pytest.mark.parametrize("path", ["/health", "/generate_health", "/metrics"])
def test_other_endpoints_are_left_alone(path):
    assert post(answering("plain", status=503, kind="text/plain"), path).text == "plain"


def test_head_requests_get_no_body_of_ours():
    messages = sent(answering(status=404, kind="text/plain"), method="HEAD")
    assert (messages[0]["status"], bodies(messages)) == (404, [])


def test_the_root_path_is_no_part_of_the_apis_path():
    messages = sent(answering("no", status=404), "/proxy/v1/messages", root_path="/proxy")
    assert json.loads(bodies(messages)[0])["error"] == {"type": "not_found_error", "message": "no"}


def test_connections_that_are_no_requests_pass():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(ErrorFormat(app)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]


@pytest.mark.parametrize(("refused", "status"), [(400, 400), (None, 500)])
def test_a_refusal_that_an_endpoint_reports_as_its_failure_is_the_clients(refused, status):
    async def app(scope, receive, send):
        scope[REFUSED] = refused
        await answering('{"error": {"message": "n is wrong"}}', status=500, kind="application/json")(
            scope, receive, send
        )

    for path in (CHAT, OLLAMA):
        assert post(app, path).status_code == status


def test_what_comes_while_the_server_shuts_down_is_no_bad_request():
    """Endpoints take a ValueError for one; clients and routers send a 503 again."""

    async def app(scope, receive, send):
        scope[REFUSED] = CLOSING
        await answering(REFUSAL)(scope, receive, send)

    for path in (CHAT, CLAUDE, "/generate"):
        assert post(app, path).status_code == 503


def test_a_refusal_keeps_its_own_status_below_500():
    async def app(scope, receive, send):
        scope[REFUSED] = 400
        await answering('{"detail": "gone"}', status=404, kind="application/json")(scope, receive, send)

    assert post(app).status_code == 404


def test_an_exception_is_an_internal_error_that_tells_nothing():
    async def app(scope, receive, send):
        raise RuntimeError("secret of the server")

    response = post(app, CLAUDE)
    assert response.status_code == 500
    assert response.json() == {"type": "error", "error": {"type": "api_error", "message": "Internal server error"}}


def test_an_exception_while_the_body_is_read_is_the_clients_fault():
    async def request_body_to_args():  # FastAPI's function that validates bodies
        raise AttributeError("'list' object has no attribute 'get'")

    async def app(scope, receive, send):
        await request_body_to_args()

    response = post(app)
    assert response.status_code == 400 and "'list' object" in response.json()["error"]["message"]


def test_an_exception_in_a_running_stream_is_not_answered_twice():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", SSE.encode())]})
        await send({"type": "http.response.body", "body": chunk(content="a").encode(), "more_body": True})
        raise RuntimeError("it broke")

    with pytest.raises(RuntimeError, match="it broke"):
        sent(app)


@pytest.mark.parametrize(("path", "kind"), [(OLLAMA, "application/json"), (CHAT, "text/plain"), (CLAUDE, "text/plain")])
def test_only_ollamas_requests_are_json_whatever_they_are_called(path, kind):
    seen = []

    async def app(scope, receive, send):
        seen.extend(value.decode() for name, value in scope["headers"] if name == b"content-type")
        await answering("{}", kind="application/json")(scope, receive, send)

    post(app, path, json=None, content=b"{}", headers={"content-type": "text/plain"})
    assert seen == [kind]
