"""A prompt far longer than the sliding-window pool: same tokens as the reference, cached or not.

`python -m scripts.benchmarks.context --full-context` does the same with 262,144 tokens.
"""

import re

import pytest
import requests

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from tests.support.cache_fuzz import outcome
from tests.support.nano_model import generate, prompts, reference

pytestmark = pytest.mark.server
LENGTH, ANSWER, CHUNK, WINDOW, PAGE = 20000, 24, 1024, 64, 16
FULL_POOL, SLIDING_POOL = 24576, 2048
ARGS = (
    *NANO_ARGS, *MTP_ARGS, "--dtype", "float32", "--context-length", "262144", "--page-size", str(PAGE),
    "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", str(FULL_POOL),
    "--swa-full-tokens-ratio", str(SLIDING_POOL / FULL_POOL), "--max-running-requests", "2",
    "--decode-log-interval", "1",
)  # fmt: skip
USED = re.compile(r"#swa token: (\d+)")
TAIL = 30  # the second request's own tokens


def code_ids(length: int) -> list[int]:
    ids = [token for text in prompts() for token in text]
    return (ids * (length // len(ids) + 1))[:length]


@pytest.fixture(scope="module")
def server(serve):
    return serve(*ARGS)


@pytest.fixture(scope="module")
def answers(server):
    """First request, the same again, and one with the same prefix and another end."""
    ids = code_ids(LENGTH)
    other = [*ids[:-TAIL], *prompts()[7][:TAIL]]
    return [outcome(generate(server, each, ANSWER)) for each in (ids, ids, other)]


def test_the_prompt_is_longer_than_the_sliding_pool(server):
    info = requests.get(f"{server.url}/server_info", timeout=60).json()
    usage = info["internal_states"][0]["memory_usage"]
    assert usage["token_capacity"] == FULL_POOL
    assert usage["token_capacity_swa"] == SLIDING_POOL < LENGTH


def test_a_hit_changes_neither_tokens_nor_drafts(answers):
    first, again, _ = answers
    assert first.cached == 0
    assert again.ids == first.ids
    assert again.accepted == first.accepted
    assert sum(again.accepted) < ANSWER - 1  # some drafts came true


def test_a_hit_recomputes_little(answers):
    """The last pages; where the other request parts from a cached one, SGLang kept the window of the last chunk."""
    _, again, other = answers
    assert LENGTH - again.cached <= 2 * PAGE
    assert LENGTH - TAIL - other.cached <= CHUNK + PAGE


def test_decoding_uses_window_and_chunk_of_the_sliding_pool(server, answers):
    used = [int(count) for count in USED.findall(server.log.read_text(errors="replace"))]
    assert used and max(used) <= SLIDING_POOL // 2, used


def test_output_is_the_references_at_a_length_it_can_afford(server):
    """transformers attends eagerly, so 4,000 tokens: past window and chunk, and longer than the sliding pool."""
    ids = code_ids(4000)
    answer = generate(server, ids, 12)
    row = reference().greedy(ids, 12)
    assert answer["output_ids"] == row
