"""admission.py: which requests get guards, and what becomes of those that cannot."""

import json
from array import array
from types import SimpleNamespace

import pytest
from sglang.srt import runtime_context

from sglang_step35.guards import admission
from sglang_step35.guards.grammar import GuardedGrammar
from tests.support.toy_tokenizer import toy_tokenizer


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    kernel = SimpleNamespace(grammar_backend="xgrammar")
    monkeypatch.setattr(runtime_context, "get_exec", lambda: SimpleNamespace(kernel=kernel))
    return kernel


def manager(tokenizer=None):
    scheduler = SimpleNamespace(tokenizer=tokenizer, model_config=SimpleNamespace(vocab_size=520))
    return SimpleNamespace(scheduler=scheduler)


class Request:
    def __init__(self, guards: dict | None = None, grammar=None):
        custom = None if guards is None else {"guards": json.dumps(guards)}
        self.sampling_params = SimpleNamespace(custom_params=custom)
        self.grammar = grammar
        self.origin_input_ids = array("q", toy_tokenizer()("слово")["input_ids"])
        self.to_finish = self.customized_info = self.refused = None

    def set_finish_with_abort(self, message: str) -> None:
        self.refused = message


def guarded(request: Request, queued: bool = False, tokenizer=None) -> Request:
    admission.guard_request(queued, manager(tokenizer or toy_tokenizer()), request)
    return request


def test_a_request_without_guards_is_left_alone():
    request = guarded(Request())
    assert request.grammar is None and request.customized_info is None
    assert guarded(Request({"reminder": True})).grammar is None, "nothing to do with tokens"


def test_guards_stand_around_the_requests_own_grammar():
    own = object()
    request = guarded(Request({"loop": True}, own))
    assert isinstance(request.grammar, GuardedGrammar) and request.grammar.grammar is own
    assert request.customized_info == {"guards": request.grammar.events}


def test_one_that_waits_for_its_grammar_is_guarded_when_it_is_ready():
    waiting = Request({"loop": True}, "compiling")
    assert guarded(waiting, queued=True).grammar == "compiling"
    admission.guard_ready_requests([waiting], manager(toy_tokenizer()))
    assert isinstance(waiting.grammar, GuardedGrammar)


def test_one_that_was_aborted_is_left_alone():
    request = Request({"loop": True})
    request.to_finish = "aborted"
    assert guarded(request).grammar is None


def test_what_cannot_be_guarded_is_refused(backend):
    request = Request({"loop": True})
    admission.guard_request(False, manager(None), request)
    assert "--skip-tokenizer-init" in request.refused
    assert "is unknown" in guarded(Request({"lop": True})).refused
    backend.grammar_backend = "outlines"
    assert "not outlines" in guarded(Request({"loop": True})).refused


def test_the_language_is_that_of_the_last_user_message():
    request = guarded(Request({"language": True}))
    assert request.grammar._rules.scripts == {"Cyrillic", "Latin", "Greek"}
