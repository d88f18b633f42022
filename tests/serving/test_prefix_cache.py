"""The prefix cache changes no token and no draft: random trees in a small pool, and multi-turn chats.

`python -m scripts.benchmarks.fuzz_cache` does the same with thousands of requests.
"""

import pytest

from tests.support.cache_fuzz import OFF_ARGS, SMALL_ARGS, Case, ask, record, replay
from tests.support.nano_model import generate, greedy, histogram, prompts
from tests.support.offline_rounds import offline_rounds

pytestmark = pytest.mark.server
REQUESTS, SEED = 150, 7
LOOKAHEAD = 3  # tokens a key looks ahead: the number of MTP layers
TURNS, ANSWER = 5, 24


@pytest.fixture(scope="module")
def rounds(serve):
    """Random requests and what a server without a cache answered."""
    return record(serve(*OFF_ARGS), REQUESTS, SEED)


def test_without_a_cache_the_output_is_the_references(rounds):
    for cases, outcomes in rounds[:6]:
        for case, found in zip(cases, outcomes, strict=True):
            assert list(found.ids) == greedy(case.ids, case.count)
            assert found.cached == 0


@pytest.mark.parametrize("page", [1, 16], scope="module")
def test_random_trees_in_a_small_cache(serve, rounds, page):
    report = replay(serve(*SMALL_ARGS, "--page-size", str(page)), rounds)
    assert not report.problems, "\n".join(report.problems[:3])
    assert report.requests >= REQUESTS
    assert report.hits >= REQUESTS // 8  # else nothing was compared
    assert report.evicted_tokens >= 2048  # the whole pool at least once


@pytest.mark.parametrize("page", [1, 16], scope="module")
def test_a_turn_recomputes_only_what_is_new(serve, page):
    """Every turn is the last prompt, its answer and new tokens.

    A cached row needs the LOOKAHEAD tokens behind it. The answer's final token has KV only where the last accepted
    run went past the answer's end, so that one token is not decided here.
    """
    server = serve(*SMALL_ARGS, "--page-size", str(page))
    server.flush_cache()
    history = []
    for turn in range(TURNS):
        ids = [*history, *prompts()[130 + turn][:37]]
        (found,) = ask(server, [Case(tuple(ids), ANSWER)])
        assert list(found.ids) == greedy(tuple(ids), ANSWER)
        known = len(history) - LOOKAHEAD
        assert found.cached in {max(0, rows) // page * page for rows in (known - 1, known)}
        history = [*ids, *found.ids]


@pytest.mark.parametrize("page", [1, 16], scope="module")
@pytest.mark.parametrize("behind", [0, 100])
def test_a_prefix_whose_request_drafted_nothing_costs_no_draft(serve, page, behind):
    """Its MTP KV was left out; three windows of it are computed when it is drafted from, where most of their sliding
    slots are gone, at its end and somewhere inside."""
    server = serve(*SMALL_ARGS, "--page-size", str(page))
    server.flush_cache()
    ids = [token for prompt in prompts()[150:156] for token in prompt][:200]
    former = generate(server, ids, 120, custom_params={"speculative_depth": 0})
    assert histogram(former)[1:] == [0, 0, 0]
    for turn in range(2):  # the second time it is there
        chat = [*ids, *former["output_ids"]][: 320 - behind] + prompts()[160 + turn][:30]
        answer = generate(server, chat, 60)
        assert answer["meta_info"]["cached_tokens"] > 150
        output = greedy(tuple(chat), 60 + LOOKAHEAD)
        assert answer["output_ids"] == output[:60]
        expected = offline_rounds(chat, output, 60)
        assert histogram(answer) == [expected[accepted] for accepted in range(4)]


def test_turns_accept_as_many_drafts_as_without_a_cache(serve):
    """Two servers: accepted drafts of every turn of a chat whose turns end around page and window edges."""
    chat, turns = [], []
    for turn, length in enumerate([64, 15, 16, 17, 63, 65]):
        chat = [*chat, *prompts()[140 + turn][:length]]
        turns.append(Case(tuple(chat), 20))
        chat = [*chat, *greedy(tuple(chat), 20)]
    answers = []
    for args in (OFF_ARGS, (*SMALL_ARGS, "--page-size", "16")):
        server = serve(*args)
        server.flush_cache()
        answers.append([ask(server, [turn])[0] for turn in turns])
    plain, cached = answers
    assert [a.ids for a in cached] == [a.ids for a in plain]
    assert [a.accepted for a in cached] == [a.accepted for a in plain]
    assert all(a.cached > 0 for a in cached[1:])
