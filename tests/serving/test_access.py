"""`--api-key` holds on every endpoint that answers a prompt or names the model, ours included."""

import pytest
import requests

from tests.support.clients import CLIENT_ARGS, MODEL

pytestmark = pytest.mark.server
KEY = "key-4f1d9c77"
USER = [{"role": "user", "content": "Hi"}]
BODIES = {
    "/generate": {"text": "Hi", "sampling_params": {"max_new_tokens": 1}},
    "/v1/completions": {"model": MODEL, "prompt": "Hi", "max_tokens": 1},
    "/v1/chat/completions": {"model": MODEL, "messages": USER, "max_tokens": 1},
    "/v1/responses": {"model": MODEL, "input": "Hi", "max_output_tokens": 4},
    "/v1/messages": {"model": MODEL, "messages": USER, "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": USER},
    "/api/chat": {"model": MODEL, "messages": USER, "stream": False, "options": {"num_predict": 1}},
    "/api/generate": {"model": MODEL, "prompt": "Hi", "stream": False, "options": {"num_predict": 1}},
    "/api/show": {"model": MODEL},
}


@pytest.fixture(scope="module")
def server(serve):
    return serve(*CLIENT_ARGS, "--api-key", KEY)


@pytest.mark.parametrize("path", BODIES)
def test_a_prompt_needs_the_key(server, path):
    assert server.post(path, BODIES[path]).status_code == 401
    assert server.post(path, BODIES[path], headers={"Authorization": "Bearer other"}).status_code == 401
    assert server.post(path, BODIES[path], headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropics_clients_send_their_key_in_a_header_of_its_own(server, path):
    assert server.post(path, BODIES[path], headers={"x-api-key": KEY}).status_code == 200
    assert server.post(path, BODIES[path], headers={"x-api-key": "other"}).status_code == 401


def test_it_is_no_key_elsewhere(server):
    path = "/v1/chat/completions"
    assert server.post(path, BODIES[path], headers={"x-api-key": KEY}).status_code == 401


@pytest.mark.parametrize("path", ["/v1/models", "/api/tags"])
def test_a_list_of_models_needs_the_key(server, path):
    assert requests.get(f"{server.url}{path}", timeout=30).status_code == 401


def test_the_log_names_no_key(server):
    log = server.log.read_text(errors="replace")
    assert "server_args=" in log
    assert KEY not in log
