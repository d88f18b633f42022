"""Malformed requests: each gets a 4xx in its API's format and disturbs neither the server nor the others."""

import threading
from collections import Counter

import pytest
import requests

from tests.support.clients import CLIENT_ARGS
from tests.support.malformed import JSON, Malformed, encode, good_bodies, malformed

pytestmark = pytest.mark.server
PATHS = sorted(good_bodies())


@pytest.fixture(scope="module")
def server(serve):
    return serve(*CLIENT_ARGS)


def message_of(path: str, error: dict) -> str:
    """The message where the API's own clients look for it."""
    if path.startswith("/api/"):
        assert set(error) == {"error"}
        return error["error"]
    if path == "/v1/messages":
        assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    elif path.startswith("/v1/"):
        assert error["error"]["type"] == "invalid_request_error" and "param" in error["error"]
    return error["error"]["message"]


def fault(server, case: Malformed) -> str | None:
    """What is wrong with the server's answer to one malformed request."""
    url = server.url + case.path
    response = requests.post(url, data=case.body, headers=dict(case.headers), timeout=60)
    name = f"{case.path}: {case.what}: {response.status_code} {response.text[:200]}"
    if not 400 <= response.status_code < 500:
        return name
    try:
        message = message_of(case.path, response.json())
    except (AssertionError, ValueError, KeyError, TypeError):
        return f"not the API's error format: {name}"
    readable = isinstance(message, str) and 3 < len(message) < 1100 and "Traceback" not in message
    return None if readable else f"not readable: {name}"


def answer(server, path: str) -> object:
    """The text that a good request gets: greedy, so always the same."""
    response = requests.post(server.url + path, data=encode(good_bodies()[path]), headers=JSON, timeout=120)
    assert response.status_code == 200, response.text
    body = response.json()
    for step in TEXT[path]:
        body = body[step]
    assert body
    return body


TEXT = {
    "/generate": ("output_ids",),
    "/v1/completions": ("choices", 0, "text"),
    "/v1/chat/completions": ("choices", 0, "message", "reasoning_content"),
    "/v1/responses": ("output", 0, "content", 0, "text"),
    "/v1/messages": ("content", 0, "thinking"),
    "/api/chat": ("message", "thinking"),
    "/api/generate": ("thinking",),
}


def test_the_set_is_large_and_the_same_every_time():
    cases = malformed()
    counts = Counter(case.path for case in cases)
    assert len(cases) >= 500 and min(counts[path] for path in PATHS) >= 70
    assert len({(case.path, case.body, case.headers) for case in cases}) >= 0.95 * len(cases)
    assert [case.body for case in cases] == [case.body for case in malformed()]


@pytest.mark.parametrize("path", PATHS)
def test_each_malformed_request_gets_a_readable_error_of_its_api(server, path):
    expected = answer(server, path)
    faults = []
    for i, case in enumerate(case for case in malformed() if case.path == path):
        faults.append(fault(server, case))
        if i % 8 == 0:
            assert answer(server, path) == expected, case.what
    assert [found for found in faults if found] == []
    assert answer(server, path) == expected


def test_malformed_requests_leave_the_results_of_others_alone(server):
    expected = {path: answer(server, path) for path in PATHS}
    cases = iter(malformed()[::2])
    lock, faults = threading.Lock(), []

    def send():
        while True:
            with lock:
                case = next(cases, None)
            if case is None:
                return
            faults.append(fault(server, case))

    senders = [threading.Thread(target=send) for _ in range(4)]
    for sender in senders:
        sender.start()
    rounds = 0
    while any(sender.is_alive() for sender in senders) or rounds == 0:
        assert {path: answer(server, path) for path in PATHS} == expected
        rounds += 1
    assert [found for found in faults if found] == []
    assert server.process.poll() is None


def test_wrong_methods_paths_and_content_types_are_worded_for_the_api(server):
    for path in PATHS:
        response = requests.get(server.url + path, timeout=60)
        assert response.status_code == 405 and message_of_any(path, response.json())
    for path in ("/v1/no_such", "/api/no_such"):
        response = server.post(path, {})
        assert response.status_code == 404 and message_of_any(path, response.json())
    for path in ("/v1/chat/completions", "/v1/messages"):
        response = requests.post(server.url + path, data=b"a=1", headers={"content-type": "text/plain"}, timeout=60)
        assert response.status_code == 400 and "application/json" in message_of(path, response.json())


def message_of_any(path: str, error: dict) -> str:
    found = error["error"]
    return found if path.startswith("/api/") else found["message"]
