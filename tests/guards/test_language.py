"""language.py, scripts.py, vocabulary.py: tables over a vocabulary against each token by itself."""

import pytest
import regex

from sglang_step35.guards.language import TokenScripts, can_begin_allowed, split
from sglang_step35.guards.scripts import NAMES, allowed_by, scripts_of
from sglang_step35.guards.vocabulary import Vocabulary
from tests.support.plain_guards import beginnings, can_become, foreign, pending, token_bytes
from tests.support.toy_tokenizer import CONTROLS, TAGS, TEXT, toy_tokenizer

SCRIPTS = [("Latin",), ("Han",), ("Cyrillic", "Latin"), ("Hiragana", "Katakana", "Han"), ("Greek",)]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(toy_tokenizer(), 520)  # more ids than tokens, as checkpoints have


@pytest.fixture(scope="module")
def table(vocabulary):
    return TokenScripts(vocabulary)


def test_bytes_are_what_the_decoder_writes(vocabulary):
    tokenizer = toy_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert b"".join(map(vocabulary.bytes_of, ids)).decode() == tokenizer.decode(ids) == TEXT
    assert [vocabulary.bytes_of(token) for token in range(len(tokenizer))] == token_bytes(tokenizer)
    turn, think = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<think>"])
    assert vocabulary.bytes_of(turn) == b"" == vocabulary.bytes_of(519) and vocabulary.bytes_of(think) == b"<think>"
    assert sum(bool(split(vocabulary.bytes_of(token))[0]) for token in range(520)) > 64


@pytest.mark.parametrize("scripts", SCRIPTS)
@pytest.mark.parametrize("before", ["", "a", "答", "👍"])
def test_forbidden_tokens_are_those_that_write_another_script(table, scripts, before):
    """Behind whole characters and behind every beginning of one."""
    encoded = before.encode()
    for stop in range(len(encoded) + 1):
        text = encoded[:stop]
        found = table.forbidden(frozenset(scripts), pending(text)).nonzero()[0].tolist()
        assert found == foreign(toy_tokenizer(), text, scripts)


def test_control_tokens_and_tags_of_a_foreign_script(table):
    tokenizer, forbidden = toy_tokenizer(), table.forbidden(frozenset({"Han"}))
    assert not forbidden[tokenizer.convert_tokens_to_ids(list(CONTROLS))].any()
    assert not forbidden[tokenizer.convert_tokens_to_ids(list(TAGS))].any()


@pytest.mark.parametrize("scripts", SCRIPTS)
def test_beginnings_of_characters(scripts):
    for begun in set().union(*map(beginnings, ("Common", "Han", "Latin", "Cyrillic", "Hiragana", "Tangut"))):
        assert can_begin_allowed(begun, frozenset(scripts)) == can_become(begun, scripts), begun


def test_every_character_has_its_script():
    chars = "".join(chr(point) for point in range(0x30000) if not 0xD800 <= point < 0xE000)
    found = scripts_of(chars)
    assert "Other" not in found.values()
    for name in ("Latin", "Han", "Greek", "Thai", "Old_Italic"):
        assert {char for char, script in found.items() if script == name} == set(
            regex.findall(rf"\p{{Script={name}}}", chars)
        )
    shared = regex.findall(r"[\p{Common}\p{Inherited}\p{Unknown}]", chars)
    assert found.keys().isdisjoint(shared) and len(found) + len(shared) == len(chars)
    assert len(set(NAMES)) == len(NAMES)


def test_scripts_that_an_answer_may_use():
    always = {"Latin", "Greek"}
    assert allowed_by("") == always == allowed_by("1 + 1 = ?")
    assert allowed_by("Что это?") == always | {"Cyrillic"}
    assert allowed_by("これは?") == always | {"Hiragana", "Katakana", "Han"}
    assert allowed_by("这是什么?") == always | {"Han"}


def test_the_last_user_message_of_a_prompt(vocabulary):
    def turn(role, text):
        return f"<|im_start|>{role}\n{text}<|im_end|>\n"

    chat = turn("user", "слово") + turn("assistant", "word") + turn("user", "答案")
    last = turn("tool_response", "カタカナ") + "<|im_start|>assistant\n<think>\n"
    ids = toy_tokenizer()(chat + last)["input_ids"]
    assert vocabulary.last_user_message(ids).strip() == "user\n答案"
    assert vocabulary.last_user_message(toy_tokenizer()("слово")["input_ids"]) == "слово"
