"""size.py: bodies above the limit get 413 in their API's format, and nobody parses them."""

import json

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from sglang_step35.http import size
from sglang_step35.http.middleware import ErrorFormat

LIMIT = 1000
TYPES = {"/v1/messages": "request_too_large", "/v1/chat/completions": "invalid_request_error"}


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(size, "MAX_BODY", LIMIT)
    app = FastAPI()
    app.parsed = []

    @app.post("/{path:path}")
    async def echo(path: str, body: dict):
        app.parsed.append(path)
        return body

    client = TestClient(ErrorFormat(app), raise_server_exceptions=False)
    client.parsed = app.parsed
    return client


def chunks(content: bytes):
    """Without a Content-Length."""
    yield from (content[i : i + 100] for i in range(0, len(content), 100))


@pytest.mark.parametrize("path", TYPES)
@pytest.mark.parametrize("send", [bytes, chunks])
def test_too_large(client, path, send):
    content = json.dumps({"prompt": "x" * LIMIT}).encode()
    answer = client.post(path, content=send(content), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == TYPES[path]
    assert client.parsed == []


@pytest.mark.parametrize("send", [bytes, chunks])
def test_up_to_the_limit(client, send):
    body = {"prompt": "x" * (LIMIT - len('{"prompt": ""}'))}
    content = json.dumps(body).encode()
    assert len(content) == LIMIT
    answer = client.post("/v1/messages", content=send(content), headers={"content-type": "application/json"})
    assert answer.json() == body
