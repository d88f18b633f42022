"""settings.py: what a request's guards may say, and the key that an error names."""

import json

import pytest

from sglang_step35.guards.settings import (
    GuardError,
    Guards,
    LanguageGuard,
    LoopGuard,
    ReasoningBudget,
    Reminder,
    parse,
)


def test_nothing_given_is_nothing_guarded():
    assert parse({}) == Guards() and not parse({}).act_on_tokens


def test_each_guard_with_its_defaults_or_its_fields():
    given = {"reasoning": {"tokens": 9}, "loop": True, "language": {"scripts": ["Han"]}, "reminder": {"every": 2}}
    guards = parse(given)
    assert guards == Guards(ReasoningBudget(9), LoopGuard(), LanguageGuard(("Han",)), Reminder(every=2))
    assert guards.act_on_tokens and hash(guards)


def test_false_and_null_turn_a_guard_off():
    assert parse({"loop": False, "language": None, "reminder": True}) == Guards(reminder=Reminder())
    assert not parse({"reminder": {}}).act_on_tokens


def test_the_text_of_an_object_is_the_object():
    given = {"loop": {"tokens": 3, "line": "終"}}
    assert parse(json.dumps(given)) == parse(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "guards must be an object with some of reasoning, loop, language, reminder, got 5"),
        ("{", "guards: Expecting"),
        ({"resoning": True}, "guards: resoning is unknown, use reasoning, loop, language, reminder"),
        ({"loop": 5}, "guards: loop must be an object, true or false, got 5"),
        ({"reasoning": True}, "guards: reasoning.tokens is missing"),
        ({"reasoning": {"tokens": -1}}, r"guards: reasoning.tokens must be an integer in \[0, 2147483647\], got -1"),
        ({"reasoning": {"tokens": True}}, "guards: reasoning.tokens must be an integer"),
        ({"reasoning": {"tokens": 5, "budget": 1}}, "guards: reasoning.budget is unknown, use tokens, line"),
        ({"reasoning": {"tokens": 5, "line": 7}}, "guards: reasoning.line must be a text"),
        ({"reasoning": {"tokens": 5, "line": "a" * 2001}}, "guards: reasoning.line must be a text of at most 2000"),
        ({"reasoning": {"tokens": 5, "line": "\ud800"}}, "guards: reasoning.line is not valid Unicode"),
        ({"loop": {"tokens": 0}}, r"guards: loop.tokens must be an integer in \[1, 4096\]"),
        ({"loop": {"times": 1}}, r"guards: loop.times must be an integer in \[2, 1000\]"),
        ({"loop": {"tokens": 9, "longest": 8}}, r"guards: loop.longest must be an integer in \[9, 4096\]"),
        ({"language": {"scripts": []}}, "guards: language.scripts must be a list"),
        ({"language": {"scripts": "Latin"}}, "guards: language.scripts must be a list"),
        ({"language": {"scripts": ["Klingon"]}}, "guards: language.scripts: 'Klingon' is none of Unicode's"),
        ({"language": {"scripts": [["Latin"]]}}, "guards: language.scripts"),
        ({"reminder": {"every": 0}}, r"guards: reminder.every must be an integer in \[1,"),
        ({"reminder": {"lines": -1}}, "guards: reminder.lines"),
        ({"reminder": {"date": 1}}, "guards: reminder.date must be true or false"),
        ({"reminder": {"identity": None}}, "guards: reminder.identity must be a text"),
    ],
)
def test_what_is_wrong_is_named(given, message):
    with pytest.raises(GuardError, match=message):
        parse(given)
