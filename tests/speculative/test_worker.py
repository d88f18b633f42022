"""The worker's rounds and prefills against a loop that recomputes everything, on random schedules of requests."""

import random

import pytest

from sglang_step35.speculative.depth import DepthPlanner
from tests.support.toy_mtp import VOCAB
from tests.support.worker_host import LENGTH, Host, make_worker


class RandomDepths(DepthPlanner):
    """Any depth in any round, and passes that stop at any layer."""

    def __init__(self, settings, seed):
        super().__init__(settings)
        self.chance = random.Random(seed)

    def next_depth(self, batch_size):
        return self.chance.choice([0, 0, *range(self.settings.num_steps + 1)])

    def stop_rule(self, batch_size):
        return self

    def stops(self, confidences):
        return self.chance.random() < 0.2


def random_prompt(chance, length):
    return [chance.randrange(VOCAB) for _ in range(length)]


def random_options(chance, sampled):
    """A third of the requests is penalised; a minimum length forbids the stop tokens."""
    penalty = (0.4, 0.3, 1.2) if chance.random() < 0.3 else (0.0, 0.0, 1.0)
    temperature = chance.choice([0.0, 0.8, 1.3]) if sampled else 0.0
    options = dict(penalty=penalty, temperature=temperature, seed=chance.randrange(1000))
    return options | dict(min_new_tokens=chance.choice([0, 0, 9]))


def admit(host, live, sampled):
    """A request whose prompt often begins like an earlier one's and takes its KV."""
    chance = host.chance
    prompt = random_prompt(chance, chance.randint(1, 30))
    if host.cached and chance.random() < 0.7:
        tokens, _ = chance.choice(host.cached)
        prompt = tokens[: chance.randint(1, 60)] + prompt[: chance.randint(1, 12)]
    hit, donor = host.longest_hit(prompt)
    live.append(host.admit(prompt, hit, donor, **random_options(chance, sampled)))


def play(host, events, sampled=False):
    """A random schedule."""
    chance, live = host.chance, []
    for _ in range(events):
        waiting = [r for r in live if not r.prefilled]
        decoding = [r for r in live if r.prefilled]
        chance.shuffle(decoding)
        what = chance.random()
        if what < 0.15 and host.indices:
            admit(host, live, sampled)
        elif what < 0.4 and waiting:
            chunk = chance.choice([1, 2, 3, 7, 64])
            spans = {r: min(chunk, len(r.tokens) - r.filled) for r in waiting[: chance.randint(1, 3)]}
            host.prefill(spans, decoding[:2] if chance.random() < 0.3 else [])
        elif what < 0.44 and live:
            gone = live.pop(chance.randrange(len(live)))
            host.release(gone, keep=chance.random() < 0.5)
        elif what < 0.47 and decoding:
            host.retract(decoding[0], index=chance.choice([None, decoding[0].pool_idx]))
        elif decoding:
            # SGLang's decode batch holds every running request, which sampling relies on; the rings bear any batch.
            host.round(decoding if sampled else decoding[: chance.randint(1, 4)])
        for request in [r for r in live if len(r.tokens) > LENGTH - 20]:
            live.remove(request)
            host.release(request)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_rounds_and_drafts_equal_a_full_recompute(monkeypatch, steps, seed):
    host = Host(make_worker(monkeypatch, steps), seed)
    play(host, 120)
    assert set(host.accepted) == set(range(steps + 1))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("full_width", [False, True])
def test_rounds_of_any_depth_equal_a_full_recompute(monkeypatch, steps, full_width):
    worker = make_worker(monkeypatch, steps, adaptive=True, full_width=full_width)
    worker.depths = RandomDepths(worker.settings, seed=steps)
    host = Host(worker, seed=10 + steps)
    play(host, 160)
    assert set(host.accepted) == set(range(steps + 1))


@pytest.mark.parametrize("adaptive", [False, True])
def test_sampled_rounds_equal_the_rule_applied_token_by_token(monkeypatch, adaptive):
    """Seeded requests, so that every draw is known, among greedy ones."""
    worker = make_worker(monkeypatch, 3, adaptive=adaptive)
    if adaptive:
        worker.depths = RandomDepths(worker.settings, seed=1)
    host = Host(worker, seed=20)
    play(host, 140, sampled=True)
    assert set(host.accepted) == {0, 1, 2, 3}
