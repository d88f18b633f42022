"""errors.py: the problem found in what SGLang sends, and its rendering for each API's own clients."""

import httpx
import ollama
import openai
import pytest
from anthropic.types import ErrorResponse
from openai.types.shared import ErrorObject

from sglang_step35.http.errors import Problem, dialect_of, find_error, read_problem, readable, validation_message

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    503: "overloaded_error",
}
OPENAI_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def rendered(path: str, status: int = 400, message: str = "top_p is wrong", param: str | None = None) -> dict:
    return dialect_of(path)(Problem(status, message, param))


@pytest.mark.parametrize(("status", "kind"), ANTHROPIC_TYPES.items())
def test_anthropic_errors_are_of_the_documented_types(status, kind):
    found = rendered("/v1/messages", status)
    assert found == {"type": "error", "error": {"type": kind, "message": "top_p is wrong"}}
    if status != 413:  # documented, but missing from the library's types
        ErrorResponse.model_validate(found)


@pytest.mark.parametrize(("status", "kind"), OPENAI_TYPES.items())
def test_openai_errors_hold_what_the_client_shows(status, kind):
    body = rendered("/v1/chat/completions", status, param="top_p")
    ErrorObject.model_validate({**body["error"], "code": str(body["error"]["code"])})
    with openai.OpenAI(api_key="none", base_url="http://host/v1") as client:
        response = httpx.Response(status, json=body, request=httpx.Request("POST", "http://host/v1"))
        error = client._make_status_error_from_response(response)
    assert "top_p is wrong" in error.message
    assert (error.type, error.param, error.code) == (kind, "top_p", status)


def test_openai_errors_repeat_their_fields_at_the_top_level_for_sglangs_own_clients():
    fields = {"message": "top_p is wrong", "type": "invalid_request_error", "param": None, "code": 400}
    assert rendered("/v1/completions") == {"object": "error", "error": fields, **fields}


def test_ollama_errors_are_one_string():
    body = rendered("/api/chat", message="“größer” ist falsch")
    assert body == {"error": "“größer” ist falsch"}
    assert ollama.ResponseError(httpx.Response(400, json=body).text, 400).error == "“größer” ist falsch"


def test_errors_of_generate_are_sglangs_own():
    assert rendered("/generate") == {"error": {"message": "top_p is wrong", "code": 400}}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_messages_are_anthropics_although_under_v1(path):
    assert rendered(path)["type"] == "error"


@pytest.mark.parametrize("path", ["/v1/messages_of_others", "/v1/models/messages", "/v1"])
def test_other_paths_under_v1_are_openais(path):
    assert rendered(path)["object"] == "error"


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/generate_from_file", "/apis", "/v11/messages", ""])
def test_other_endpoints_keep_their_errors(path):
    assert dialect_of(path) is None


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        "error",
        {},
        {"choices": []},
        {"error": None, "text": "fine"},
        {"type": "response.completed", "response": {"error": None}},
        {"meta_info": {"finish_reason": {"type": "stop", "matched": 2}}},
        {"meta_info": {"finish_reason": None}},
        {"meta_info": None},
        {"object": "chat.completion.chunk", "message": "a text"},
        # A client that hangs up or pauses: no failure of the request.
        {"meta_info": {"finish_reason": {"type": "abort", "message": "Aborted", "status_code": None}}},
    ],
)
def test_answers_are_no_errors(payload):
    assert find_error(payload) is None


@pytest.mark.parametrize(
    ("payload", "status", "message"),
    [
        ({"error": {"message": "m", "code": 404}}, 404, "m"),
        ({"error": {"message": "m", "code": "400"}}, 400, "m"),
        ({"error": {"message": "m", "type": "server_error"}}, 500, "m"),
        ({"type": "error", "error": {"type": "api_error", "message": "m"}}, 500, "m"),
        ({"type": "error", "error": {"type": "invalid_request_error", "message": "m"}}, 400, "m"),
        ({"error": {"message": "m", "type": "InternalServerError", "code": 200}}, 500, "m"),
        ({"object": "error", "message": "m", "type": "BadRequestError", "code": 422}, 422, "m"),
        ({"error": "m"}, 400, "m"),
        ({"detail": "m"}, 400, "m"),
        ({"detail": [{"loc": ["a"]}]}, 400, "[{'loc': ['a']}]"),
        ({"error": {"detail": "m"}}, 400, "m"),
        ({"error": {"why": "unknown"}}, 400, '{"why": "unknown"}'),
        ({"type": "response.failed", "response": {"error": {"code": "server_error", "message": "m"}}}, 500, "m"),
        ({"type": "response.failed", "response": {"error": {"code": "invalid_prompt", "message": "m"}}}, 400, "m"),
        ({"meta_info": {"finish_reason": {"type": "abort", "status_code": 503, "message": "m"}}}, 503, "m"),
        ({"meta_info": {"finish_reason": {"type": "abort", "status_code": 400}}}, 400, ""),
    ],
)
def test_errors_are_found_in_every_shape(payload, status, message):
    found = find_error(payload)
    assert (found.status, found.message) == (status, message)


def test_the_parameter_at_fault_is_kept():
    assert find_error({"error": {"message": "m", "param": "temperature"}}).param == "temperature"
    assert read_problem(400, b'{"error": {"message": "m", "param": "temperature"}}').param == "temperature"


def test_the_status_of_the_response_goes_before_the_one_in_its_body():
    assert read_problem(404, b'{"error": {"message": "no such model", "code": 500}}') == Problem(404, "no such model")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"Internal Server Error", "Internal Server Error"),
        (b'{"detail": "Method Not Allowed"}', "Method Not Allowed"),
        (b'"quoted"', '"quoted"'),
        (b"", "Request failed"),
        (b"  \n", "Request failed"),
        ('{"error": "größer als 5"}'.encode(), "größer als 5"),
        (b"bad \xff byte", "bad \ufffd byte"),
    ],
)
def test_bodies_of_any_kind_become_a_message(body, message):
    assert read_problem(400, body) == Problem(400, message)


def test_paths_of_the_servers_files_are_left_out():
    text = 'Traceback:\n  File "/srv/secret/app.py", line 3, in run\nValueError: too long'
    assert readable(text) == "Traceback:\nValueError: too long"


def test_long_messages_are_cut_past_a_thousand_characters():
    assert readable("ü" * 1000) == "ü" * 1000
    assert readable("ü" * 1001) == "ü" * 1000 + "…"


def wrong(*loc, message: str = "Input should be a valid integer", **more) -> dict:
    return {"loc": loc, "msg": message, "type": "int_parsing", "input": "SECRET", **more}


def test_validation_names_the_field_and_not_its_value():
    assert validation_message([wrong("body", "messages", 0, "n")]) == "messages.0.n: Input should be a valid integer"


def test_validation_without_a_field_is_the_message_alone():
    assert validation_message([wrong("body", message="Field required")]) == "Field required"
    assert validation_message([]) == "invalid request"


def test_validation_names_five_problems_and_counts_the_others():
    five = [wrong("body", name, message="bad") for name in "abcde"]
    assert validation_message(five) == "a: bad; b: bad; c: bad; d: bad; e: bad"
    assert validation_message([*five, *five[:2]]).endswith("e: bad; and 2 more")


def test_broken_json_is_located():
    error = wrong("body", 17, message="JSON decode error", type="json_invalid", ctx={"error": "Expecting value"})
    assert validation_message([error]) == "JSON decode error at character 17: Expecting value"
