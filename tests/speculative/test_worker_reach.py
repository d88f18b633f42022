"""How far back the worker reads, what it may find there, and what it counts."""

from dataclasses import replace

import pytest
import torch

from sglang_step35.planner.kv import KVLayout
from sglang_step35.speculative.rings import RequestRings
from sglang_step35.speculative.settings import MTPSettings
from tests.support.toy_mtp import EARLIER_KEYS
from tests.support.worker_host import Host, Witness, make_worker

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


class WitnessRings(RequestRings):
    """Rings that know which position each entry holds, and what reads found; garbage is -1."""

    def __init__(self, like):
        self.__dict__.update(like.__dict__)
        self.hidden_at, self.tokens_at = (torch.full_like(like.tokens, -1) for _ in range(2))
        self.lengths = {}  # committed positions by pool index, the round's included
        self.deepest = 0

    def put(self, pool_indices, positions, hidden):
        super().put(pool_indices, positions, hidden)
        self.hidden_at[pool_indices, positions % self.capacity] = positions

    def put_tokens(self, pool_indices, positions, tokens):
        super().put_tokens(pool_indices, positions, tokens)
        self.tokens_at[pool_indices, positions % self.capacity] = positions

    def window(self, pool_indices, start, width):
        self.check(self.hidden_at, pool_indices, start, width, known_after=0)
        return super().window(pool_indices, start, width)

    def token_window(self, pool_indices, start, width):
        self.check(self.tokens_at, pool_indices, start, width, known_after=1)
        return super().token_window(pool_indices, start, width)

    def check(self, held, pool_indices, start, width, known_after):
        for index, first in zip(pool_indices.tolist(), start.tolist()):
            newest = int(self.hidden_at[index].max())
            self.deepest = max(self.deepest, newest + 1 - first)
            for position in range(max(first, known_after), min(first + width, newest + 1 + known_after)):
                assert held[index, position % self.capacity] == position, "overwritten or never written"


class Laggiest(Witness):
    """Never drafts: layers run only where they must catch up."""

    def next_depth(self, batch_size, owed=0.0):
        return 0


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("full_width", [False, True])
def test_reads_stay_within_the_rings_and_the_retained_positions(monkeypatch, steps, adaptive, full_width):
    """The toy layers refuse keys before the retained positions, `WitnessRings` any entry another position holds."""
    worker = make_worker(monkeypatch, steps, adaptive, full_width)
    rings = worker.upkeep.rings = WitnessRings(worker.upkeep.rings)
    worker.upkeep.reader = replace(worker.upkeep.reader, states=rings)
    if adaptive:
        worker.depths = Laggiest(worker.settings)
    host = Host(worker)
    live = [host.admit(PROMPT[:length]) for length in (3, 20)]
    for request in live:
        host.prefill({request: len(request.tokens)})
    drafted = []
    while max(len(r.tokens) for r in live) < 150:
        host.round(live)
        drafted += worker.store.drafts.counts([live[0].pool_idx])
    settings = worker.settings
    assert set(drafted) == {0 if adaptive else steps}
    assert rings.deepest + steps <= settings.ring_capacity
    if adaptive:
        assert rings.deepest > settings.ring_capacity - 12, "laziness was to be driven to its limit"
    else:
        assert rings.deepest == settings.pass_rows


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_planner_retains_what_the_worker_reads(monkeypatch, steps):
    layout = KVLayout(1, 1, steps, 1, 1, 1, EARLIER_KEYS)
    assert layout.retained == make_worker(monkeypatch, steps).draft_swa_window == EARLIER_KEYS + steps
    adaptive = make_worker(monkeypatch, steps, adaptive=True)
    assert adaptive.draft_swa_window == EARLIER_KEYS + MTPSettings(steps, adaptive=True).ring_capacity


def test_counters_add_up_the_drafts_reached_and_accepted(monkeypatch):
    class Counters:
        totals = [[0] * 3, [0] * 3]

        def add(self, *rounds):
            self.totals = [[a + b for a, b in zip(*pair)] for pair in zip(self.totals, rounds)]

    worker = make_worker(monkeypatch, 3)
    worker.draft_counters = Counters()
    host = Host(worker)
    live = [host.admit(PROMPT[:length]) for length in (5, 9)]
    host.prefill({r: len(r.tokens) for r in live})
    for _ in range(30):
        host.round(live)
    offered, accepted = worker.draft_counters.totals
    assert offered == [sum(n >= i for n in host.accepted) for i in range(3)]
    assert accepted == [sum(n > i for n in host.accepted) for i in range(3)]


def test_a_request_admitted_again_where_its_prefill_ended_does_not_read_rings_that_moved_on(monkeypatch):
    """Retracted after many rounds, on its old pool index, with a hit as long as its prompt; KV that others share."""
    host = Host(make_worker(monkeypatch, 3))
    request = host.admit(PROMPT)
    host.prefill({request: len(PROMPT)})
    while request.filled < len(PROMPT) + 30:
        host.round([request])
    shared = host.table[request.pool_idx].tolist()
    request.filled, request.relay = len(PROMPT), None
    host._give_slots(request, shared)
    host.prefill({request: len(request.tokens) - request.filled})
    other = host.admit([*request.tokens[: len(PROMPT) + 3], 0], len(PROMPT), shared)
    host.prefill({other: 4})


@pytest.mark.parametrize("alone", [True, False])
def test_a_prefill_computes_what_is_read(monkeypatch, alone):
    """Outputs of the last layer feed nothing but the drafts, and drafts inside a prompt are dropped."""
    host = Host(make_worker(monkeypatch, 3, full_width=not alone))
    toy, other = host.worker._draft_worker.model, host.admit(PROMPT * 2)
    made = host.admit(PROMPT * 3)
    host.prefill({made: 25, other: 20})
    assert toy.rows == [45, 45, 0 if alone else 45] and toy.predicted == 0
    host.prefill({made: 35, other: 10})  # the two rows before a chunk come again
    assert toy.rows == [94, 94, 2 if alone else 94] and toy.predicted == 3 * 2
    host.prefill({other: 10})
    host.round([made, other])
