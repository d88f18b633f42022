"""What the worker keeps of a request between rounds, and what it must no longer believe."""

from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_step35.speculative.acceptance import accept_sampled, inverse_cdf
from sglang_step35.speculative.rings import RequestRings
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.state import RequestStore

STEPS, VOCAB, INDEX = 3, 11, 2


def make_store() -> RequestStore:
    return RequestStore.allocate(MTPSettings(STEPS), 6, vocab_size=VOCAB, device="cpu")


def make_rings() -> RequestRings:
    return RequestRings(6, MTPSettings(STEPS).ring_capacity, 4, torch.float32, "cpu")


def prefill(rings: RequestRings, rid: str, first: int, end: int) -> None:
    rings.begin([INDEX], [rid], [first], [end])


def test_a_chunk_goes_on_where_the_last_one_ended():
    rings = make_rings()
    prefill(rings, "a", 0, 100)
    assert rings.known_before(INDEX, "a", 100) == rings.capacity
    assert rings.known_before(INDEX, "a", 99) == 0
    assert rings.known_before(INDEX, "b", 100) == 0


def test_a_retracted_request_back_at_its_old_prefill_end_knows_nothing():
    """It decoded past its prompt, so the entries before the prompt's end hold later positions."""
    rings = make_rings()
    prefill(rings, "a", 0, 100)
    rings.leave_prefill([INDEX])
    assert rings.known_before(INDEX, "a", 100) == 0
    prefill(rings, "a", 100, 164)
    assert rings.known_before(INDEX, "a", 164) == rings.capacity


def test_a_request_decoding_beside_prefills_goes_on():
    rings = make_rings()
    prefill(rings, "a", 90, 100)
    rings.leave_prefill([INDEX, INDEX + 1])
    assert rings.known_before(INDEX, "a", 103, decoding=True) == 13
    assert rings.first_after_prefill(INDEX, 103, 13) == 90


# Distributions of sampled drafts.


def passed(rows: int, steps: int = STEPS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(rows, VOCAB, generator=generator) for _ in range(steps)]


def note(store: RequestStore, pool_idx: list[int], probs: list[torch.Tensor]) -> None:
    counts = lambda requests: [len(probs)] * requests
    store.note_drafts(pool_idx, SimpleNamespace(confidences=[], probs=probs, counts=counts))


def test_no_memory_is_taken_for_the_whole_pool():
    """SGLang sizes its KV pools before it tells the worker how many requests there may be."""
    store = RequestStore.allocate(MTPSettings(STEPS), 512, vocab_size=1000, device="cpu")
    numbers = CountNumbers()
    with numbers:
        note(store, [3], [torch.zeros(1, 1000) for _ in range(STEPS)])
        store.begin_round([3])
        store.probs.get([3], STEPS)
    assert numbers.largest <= STEPS * 1000


class CountNumbers(TorchDispatchMode):
    """Notes the largest tensor any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_rows_follow_their_requests_through_merged_and_filtered_batches():
    store, old, new = make_store(), passed(3, seed=1), passed(2, seed=2)
    note(store, [4, 1, 5], old)
    note(store, [0, 3], new)
    found = store.probs.get([1, 5, 0, 3], STEPS)
    expected = torch.cat((torch.stack(old, 1)[1:], torch.stack(new, 1)))
    assert torch.equal(found, expected)
    assert torch.equal(
        store.probs.get([3, 4], 2), torch.stack((torch.stack(new, 1)[1, :2], torch.stack(old, 1)[0, :2]))
    )


def test_steps_without_a_draft_and_greedy_passes_leave_nothing_of_q():
    store, probs = make_store(), passed(1, steps=1)
    note(store, [1], probs)
    note(store, [2], [])
    found = store.probs.get([1, 2], STEPS)
    assert torch.equal(found[0, 0], probs[0][0])
    assert not found[0, 1:].any() and not found[1].any()


def test_other_requests_are_forgotten_with_the_round_and_their_drafts_never_accepted():
    store = make_store()
    note(store, [1, 2], passed(2))
    store.begin_round([2])
    note(store, [2], passed(1))
    proposal = store.probs.get([1], STEPS)
    target = torch.rand(1, STEPS + 1, VOCAB)
    drafts, coins = torch.tensor([[1, 2, 3]]), torch.zeros(1, STEPS, dtype=torch.float64)
    coin = torch.tensor([0.5], dtype=torch.float64)
    tokens, length = accept_sampled(drafts, target, proposal, coins, coin)
    assert length.item() == 1 and tokens[0, 0] == inverse_cdf(target[:, 0], coin)
