"""The MTP pass of a prefill against a plain loop: for each layer and row, which token and hidden state it must read."""

import random
from types import SimpleNamespace

import pytest
import torch

from sglang_step35.speculative.prefill import Chunks, PrefillPass
from sglang_step35.speculative.ring_upkeep import RingUpkeep
from sglang_step35.speculative.settings import MTPSettings
from tests.support.toy_requests import ToyRequest

POOL, LENGTH, SAMPLED = 4, 100, 10_000
TABLE = 1000 * torch.arange(1, POOL + 1)[:, None] + torch.arange(LENGTH)  # a slot names its index and position


class Pool:
    """SGLang's request pool."""

    req_to_token = TABLE


def make_store(steps):
    return RingUpkeep(MTPSettings(num_steps=steps), Pool(), hidden_size=1, dtype=torch.int64, device="cpu")


def request(rid, index, length, filled=0):
    """Tokens that name their request and position."""
    base = 100 * (1 + sum(map(ord, rid)))
    return ToyRequest(rid=rid, origin_input_ids=[base + t for t in range(length)], pool_idx=index, filled=filled)


def state(made, position):
    """The hidden state that belongs to a position."""
    return -made.tokens[position]


def snapshot(store):
    rings = store.rings
    tensors = (rings.hidden, rings.tokens, rings.first_known)
    return [t.tolist() for t in tensors], dict(rings._prefills), list(store.lag.behind)


def extend(store, spans, decoding=()):
    """Run a prefill's bookkeeping and check all it reads; spans: request -> positions."""
    requests, counts = [*spans, *decoding], [*spans.values(), *[1] * len(decoding)]
    batch = SimpleNamespace(
        reqs=requests,
        req_pool_indices=torch.tensor([r.pool_idx for r in requests]),
        prefix_lens=[r.filled for r in requests],
        extend_lens=counts,
        decoding_reqs=list(decoding) or None,
        prefill_stats=None,
    )
    before = snapshot(store)
    made = PrefillPass(batch, Chunks.of(batch), store.rings, store.lag, TABLE)
    sampled = torch.arange(len(requests)) + SAMPLED
    rows = made.rows(sampled)
    new = [state(r, t) for r, n in zip(requests, counts) for t in range(r.filled, r.filled + n)]
    hidden = made.hidden(torch.tensor(new)[:, None])
    assert snapshot(store) == before, "only `remember` may write"
    for b, (r, count) in enumerate(zip(requests, counts)):
        check_request(store, r, count, b, SAMPLED + b, made.front[b], rows, hidden)
    made.remember(rows, hidden)
    for r, count in zip(requests, counts):
        r.filled += count
    return made


def check_request(store, made, count, b, sampled, front, rows, hidden):
    """The rows of one request: the chunk and `front` positions before it."""
    steps, end = store.lag.num_layers, made.filled + count
    at = sum(rows.row_counts[:b])
    final = end == len(made.tokens)
    line = [*made.tokens, sampled] if final else made.tokens
    for row, position in enumerate(range(made.filled - front, end), at):
        assert rows.positions[row] == position and rows.slots[row] == TABLE[made.pool_idx, position]
        assert hidden[row] == state(made, position)
        for layer in range(steps):
            if position + 1 + layer < len(line):
                assert rows.line[rows.base[row] + layer] == line[position + 1 + layer], (position, layer)
    last = int(rows.last[b])
    assert last == at + front + count - 1 and rows.ends[b] == end and rows.row_counts[b] == front + count
    read = {int(rows.base[row]) + layer for row in range(at, last + 1) for layer in range(steps)}
    drafts = {int(rows.draft_at[b]) + layer for layer in range(steps)}
    if final:  # the next layer's last row reads the draft
        assert int(rows.draft_at[b]) == int(rows.base[last]) + 1
    else:
        assert not read & drafts, "a draft inside the prompt would replace a true token"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_whole_prompt_ends_with_the_sampled_token(steps):
    store = make_store(steps)
    made = extend(store, {request("a", 2, 9): 9, request("b", 0, 1): 1})
    assert made.front == [0, 0] and made.chunks.final == [True, True]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("chunks", [(8, 8), (8, 1), (8, 2), (8, 3), (1, 1, 1), (2, 1, 4), (40, 7), (1, 20)])
def test_chunks_read_the_prompts_tokens_and_recompute_the_rows_before(steps, chunks):
    store, made = make_store(steps), request("a", 1, sum(chunks))
    other = request("b", 3, 50)
    for count in chunks:
        front = min(made.filled, steps - 1)
        passed = extend(store, {other: 2, made: count})
        assert passed.front[1] == front
    assert passed.chunks.final == [False, True]


def test_a_prefix_hit_has_no_hidden_states_before_it():
    store = make_store(3)
    made = request("a", 1, 30, filled=12)
    assert extend(store, {made: 1}).front == [0]
    assert store.rings.first_known[1] == 12
    assert extend(store, {made: 1}).front == [1], "only position 12 is known"
    assert extend(store, {made: 16}).front == [2]
    assert store.rings.first_known[1] == 12


def test_a_decoding_request_in_a_mixed_batch_goes_on_from_its_rings():
    store = make_store(3)
    made = request("a", 1, 10)
    extend(store, {made: 10})
    commit(store, made, [1, 4, 2])
    made.output_ids.append(7)
    assert extend(store, {request("b", 2, 20): 5}, [made]).front == [0, 2]


def test_layers_that_lag_are_caught_up_in_a_mixed_batch():
    store = make_store(3)
    made = request("a", 1, 10)
    extend(store, {made: 10})
    commit(store, made, [2, 3])
    store.lag.note([1], 4)
    made.output_ids.append(7)
    assert extend(store, {request("b", 2, 20): 5}, [made]).front == [0, 6]
    assert store.lag.of(1) == 0


def commit(store, made, lengths):
    """Rounds that accept `lengths` tokens each, as the worker puts them into the rings."""
    for length in lengths:
        made.output_ids += [len(made.tokens) + 5 * i for i in range(length + 1 - (len(made.tokens) - made.filled))]
        positions = torch.arange(made.filled, made.filled + length)
        owner = torch.full_like(positions, made.pool_idx)
        store.rings.put(owner, positions, torch.tensor([state(made, t) for t in positions])[:, None])
        made.filled += length
    made.output_ids = made.output_ids[: made.filled - len(made.origin_input_ids)]


@pytest.mark.parametrize("filled", [0, 10])
def test_another_request_on_the_same_pool_index_sees_nothing_of_the_former(filled):
    """The newcomer starts exactly where the former one ended, too."""
    store = make_store(3)
    extend(store, {request("old", 1, 20): 10})
    store.lag.note([1], 4)
    made = request("new", 1, 20, filled)
    assert extend(store, {made: 5}).front == [0]
    assert store.rings.first_known[1] == filled and store.lag.of(1) == 0
    assert extend(store, {made: 1}).front == [2]


def test_a_prefill_of_the_same_request_from_elsewhere_starts_anew():
    """Retracted and admitted again on its old pool index."""
    store = make_store(3)
    made = request("a", 1, 30)
    extend(store, {made: 20})
    for filled in (0, 16):
        made.filled = filled
        assert extend(store, {made: 4}).front == [0]


@pytest.mark.parametrize("seed", range(20))
def test_random_chunks_of_several_requests(seed):
    chance = random.Random(seed)
    store = make_store(chance.randint(1, 3))
    live = [request(f"{seed}-{i}", i, chance.randint(1, 60), chance.choice([0, 0, 1, 17])) for i in range(POOL)]
    live = [r for r in live if r.filled < len(r.tokens)]
    while live:
        chance.shuffle(live)
        extend(store, {r: chance.randint(1, min(20, len(r.tokens) - r.filled)) for r in live[: chance.randint(1, 3)]})
        live = [r for r in live if r.filled < len(r.tokens)]
