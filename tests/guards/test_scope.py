"""scope.py: where an answer quotes."""

import random

import pytest

from sglang_step35.guards.scope import Scope
from tests.support.plain_guards import quoted

QUOTED = [
    "```", "a\n```python\nx = 1\n", "`", "a `b", "``", '"', 'he said "', "“", "„", "«", "「", "『", "《", "> a",
    "a\n  > b", "`a` and `b", '"a" and "b', "```\na `b` \"c\"\n", "“a", "```\na\n```\n```\n",
]  # fmt: skip
PLAIN = [
    "", "a", "```\na\n```", "```\na\n```\n", "`a`", "``a``", '"a"', "“a”", "„a“", "«a»", "「a」", "> a\n", 'a "b\n',
    "a `b\n", "a > b", "it's", "5 > 3\n", "`a` b", "```\na\n``` b", "’",
]  # fmt: skip


@pytest.mark.parametrize("text", QUOTED)
def test_inside(text):
    assert Scope().after(text).quotes
    assert all(Scope().after(text[:i]).after(text[i:]) == Scope().after(text) for i in range(len(text)))


@pytest.mark.parametrize("text", PLAIN)
def test_outside(text):
    assert not Scope().after(text).quotes


@pytest.mark.parametrize("seed", range(20))
def test_any_text_is_read_as_in_one_go(seed):
    text = "".join(random.Random(seed).choices('``\n> "“”„«»a', k=60))
    for i in range(len(text)):
        assert Scope().after(text[:i]).quotes == quoted(text[:i]), text[:i]


def test_a_tool_call_quotes_until_its_end_whatever_is_in_it():
    scope = Scope().after("a ").call(opens=True).after('\n<parameter=x>\n"\n`\n')
    assert scope.quotes and not scope.call(opens=False).quotes
