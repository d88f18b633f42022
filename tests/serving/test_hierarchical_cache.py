"""KV that was written back to host memory and loaded again is that of every layer, the MTP layers' too.

Drafts depend on the MTP layers' KV and tokens on the backbone's, so ids and accepted drafts of every request must be
those of a server without a cache, whose ids are the reference's and whose drafts are the offline loop's.
"""

import pytest

from tests.support.cache_fuzz import HOST_ARGS, OFF_ARGS, Case, ask, record, replay
from tests.support.nano_model import greedy, prompts, random_ids

pytestmark = pytest.mark.server
REQUESTS, SEED = 120, 11
MODES = [("1", "write_back"), ("16", "write_through")]


@pytest.fixture(scope="module")
def rounds(serve):
    return record(serve(*OFF_ARGS), REQUESTS, SEED)


@pytest.mark.parametrize(("page", "policy"), MODES, scope="module")
def test_random_trees_with_host_memory(serve, rounds, page, policy):
    server = serve(*HOST_ARGS, "--page-size", page, "--hicache-write-policy", policy)
    report = replay(server, rounds)
    assert not report.problems, "\n".join(report.problems[:3])
    assert report.loaded_tokens >= 1000  # else nothing was compared
    assert report.evicted_tokens >= 2048  # the whole pool at least once


@pytest.mark.parametrize(("page", "policy"), MODES, scope="module")
def test_a_prompt_evicted_from_the_pool_is_loaded(serve, page, policy):
    server = serve(*HOST_ARGS, "--page-size", page, "--hicache-write-policy", policy)
    server.flush_cache()
    case = Case(tuple(prompts()[3]), 40)
    (first,) = ask(server, [case])
    for ids in random_ids(3, 400):
        ask(server, [Case(tuple(ids), 1)])
    (second,) = ask(server, [case])
    assert list(first.ids) == list(second.ids) == greedy(case.ids, case.count)
    assert first.cached == 0 and second.loaded >= 0.8 * len(case.ids)
    assert second.accepted == first.accepted
