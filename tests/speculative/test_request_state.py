"""What the worker keeps of a request between rounds, and what it must no longer believe."""

import torch

from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.state import RequestStore

STEPS, VOCAB, INDEX = 3, 11, 2


def make_store() -> RequestStore:
    return RequestStore.allocate(
        MTPSettings(STEPS), 6, hidden_size=4, vocab_size=VOCAB, dtype=torch.float32, device="cpu"
    )


def prefill(store: RequestStore, rid: str, first: int, end: int) -> None:
    store.begin_prefill([INDEX], [rid], [first], [end])


def test_a_chunk_goes_on_where_the_last_one_ended():
    store = make_store()
    prefill(store, "a", 0, 100)
    assert store.rings.known_before(INDEX, "a", 100) == store.rings.capacity
    assert store.rings.known_before(INDEX, "a", 99) == 0
    assert store.rings.known_before(INDEX, "b", 100) == 0


def test_a_retracted_request_back_at_its_old_prefill_end_knows_nothing():
    """It decoded past its prompt, so the entries before the prompt's end hold later positions."""
    store = make_store()
    prefill(store, "a", 0, 100)
    store.begin_round([INDEX])
    assert store.rings.known_before(INDEX, "a", 100) == 0
    prefill(store, "a", 100, 164)
    assert store.rings.known_before(INDEX, "a", 164) == store.rings.capacity


def test_a_request_decoding_beside_prefills_goes_on():
    store = make_store()
    prefill(store, "a", 90, 100)
    store.begin_round([INDEX, INDEX + 1])
    assert store.rings.known_before(INDEX, "a", 103, decoding=True) == 13
    assert store.rings.first_after_prefill(INDEX, 103, 13) == 90
