"""The worker's rounds and prefills against a loop that recomputes everything, on random schedules of requests."""

import random
from dataclasses import replace

import pytest

from sglang_step35.speculative import lookup
from sglang_step35.speculative.lookup import LookUps
from tests.support.plain_lookup import continuation
from tests.support.toy_mtp import VOCAB, Definition
from tests.support.worker_host import LENGTH, Host, Witness, make_worker


class RandomDepths(Witness):
    """Any depth in any round, passes that stop at any layer, drafts that are not offered, any number of plain steps,
    and look-ups or none."""

    def __init__(self, settings, seed):
        super().__init__(settings)
        self.chance = random.Random(seed)

    def next_depth(self, batch_size, owed=0.0):
        return self.chance.choice([0, 0, *range(self.settings.num_steps + 1)])

    def most_offered(self, batch_size):
        self.most = self.chance.choice([0, 1, *[self.settings.num_steps] * 10])
        return self.most

    def plain_steps(self, batch_size, most):
        return self.chance.randint(1, most)

    def look_ups_pay(self, drafted, tokens):
        return self.chance.random() < 0.8

    def stop_rule(self, batch_size):
        return self

    def stops(self, confidences):
        return self.chance.random() < 0.2


class RestingDepths(RandomDepths):
    """Long times without drafts and with them, prefills among them."""

    resting = False

    def next_depth(self, batch_size, owed=0.0):
        if self.chance.random() < 0.1:
            self.resting = not self.resting
        return 0 if self.resting else self.chance.choice([0, *range(self.settings.num_steps + 1)])

    def rests(self, batch_size):
        return self.resting


def random_prompt(chance, length):
    return [chance.randrange(VOCAB) for _ in range(length)]


def random_options(chance, sampled):
    """A third of the requests is penalised; a minimum length forbids the stop tokens."""
    penalty = (0.4, 0.3, 1.2) if chance.random() < 0.3 else (0.0, 0.0, 1.0)
    temperature = chance.choice([0.0, 0.8, 1.3]) if sampled else 0.0
    options = dict(penalty=penalty, temperature=temperature, seed=chance.randrange(1000))
    return options | dict(min_new_tokens=chance.choice([0, 0, 9]), limit=chance.choice([None, None, None, 0, 2]))


def admit(host, live, sampled):
    """A request whose prompt often begins like an earlier one's and takes its KV."""
    chance = host.chance
    prompt = random_prompt(chance, chance.randint(1, 30))
    if host.cached and chance.random() < 0.7:
        tokens, _ = chance.choice(host.cached)
        prompt = tokens[: chance.randint(1, 60)] + prompt[: chance.randint(1, 12)]
    hit, donor = host.longest_hit(prompt)
    live.append(host.admit(prompt, hit, donor, **random_options(chance, sampled)))


def play(host, events, sampled=False, every=False):
    """A random schedule; every: rounds hold all decoding requests, as SGLang's decode batch does.

    Sampling and look-ups rely on that; the rings bear any batch.
    """
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
            host.round(decoding if sampled or every else decoding[: chance.randint(1, 4)])
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


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("sliding, states", [(400, None), (2000, None), (2000, 30), (400, 100)])
@pytest.mark.parametrize("seed", range(2))
def test_kv_left_out_is_computed_from_what_slots_keep(monkeypatch, steps, sliding, states, seed):
    """Where slots or states are short as well: then nothing is drafted for whom it concerns."""
    worker = make_worker(monkeypatch, steps, adaptive=True, sliding=sliding, states=states)
    worker.depths = RestingDepths(worker.settings, seed=steps)
    host = Host(worker, seed=20 + seed)
    play(host, 400)
    assert set(host.accepted) == set(range(steps + 1))


@pytest.mark.parametrize("adaptive", [False, True])
def test_of_a_long_prompt_only_what_its_drafts_read_is_computed(monkeypatch, adaptive):
    """With adaptive depth. Otherwise all of it, which whoever shares the prompt may draft from."""
    worker, passes = make_worker(monkeypatch, 3, adaptive=adaptive, sliding=2000), []
    host, entering = Host(worker), worker.depths.entering
    worker.depths.entering = lambda prompts, rows: passes.append((prompts, rows)) or entering(prompts, rows)
    request = host.admit(random_prompt(host.chance, 70))
    host.prefill({request: 60})
    host.prefill({request: 10})
    assert len(request.drafts) == 3 and worker.upkeep.reach < 60
    earlier = worker.settings.num_steps - 1  # rows whose tokens were not known behind the first chunk
    assert passes == ([(1, worker.upkeep.reach)] if adaptive else [(0, 60), (1, 10 + earlier)])
    middle, short = (host.admit(random_prompt(host.chance, length)) for length in (70, 9))
    host.prefill({middle: 60, short: 9})
    assert len(short.drafts) == 3
    assert passes[-1] == (1, 9 + (1 if adaptive else 60))
    host.prefill({middle: 10})
    assert len(middle.drafts) == 3


@pytest.mark.parametrize("hit", range(8, 36))
def test_rows_that_a_catch_up_only_passes_through_are_not_taken_for_exact(monkeypatch, hit):
    """A prefix without KV, one request that catches up at its end, and another that hits some of it."""
    worker = make_worker(monkeypatch, 3, adaptive=True, sliding=2000)
    host, rests = Host(worker), [True]
    worker.depths.rests = lambda _: rests[0]
    former = host.admit(random_prompt(host.chance, 40))
    host.prefill({former: 40})
    host.release(former, keep=True)
    ((_, slots),), rests[0] = host.cached, False
    for shared in (36, hit):
        made = host.admit([*former.tokens[: shared + 3], 0], shared, slots)
        host.prefill({made: 4})
        assert len(made.drafts) == 3


def test_a_prefill_asks_how_rounds_of_all_requests_there_are_then_go(monkeypatch):
    """Those that decode, those of the prefill, and as many of its length as wait, while the pool has room."""
    worker, sizes = make_worker(monkeypatch, 3, adaptive=True, sliding=2000), []
    host = Host(worker)
    worker.depths.rests = lambda size: bool(sizes.append(size))
    first, second, third = (host.admit(random_prompt(host.chance, 9)) for _ in range(3))
    host.prefill({first: 9, second: 4})
    host.round([first])
    host.prefill({second: 5, third: 9})
    host.release(first)
    host.prefill({host.admit(random_prompt(host.chance, 9)): 9})
    assert sizes == [3, 3, 3]
    for waiting in (8, 19, 900):
        host.release(second)
        second = host.admit(random_prompt(host.chance, 9))
        host.prefill({second: 5}, waiting=waiting)
    assert sizes[3:] == [3, 5, worker.req_to_token_pool.size]


@pytest.mark.parametrize("captured", [(), (2,), (1, 2, 3)])
def test_a_chain_is_verified_at_the_next_width_that_was_captured(monkeypatch, captured):
    """By that width's attention and graphs, which are gone from the runner behind the step."""
    worker = make_worker(monkeypatch, 3, adaptive=True, full_width=True, captured=captured)
    worker.depths = RandomDepths(worker.settings, seed=4)
    play(Host(worker, seed=40), 160)
    target, needed = worker._target_worker, worker.depths.needed
    own = {width: (f"attention {width}", f"graphs {width}") for width in captured}
    wanted = [min(width for width in (*captured, 4) if width >= chain) for chain in needed]
    assert target.verified_by == [(width, *own.get(width, ("attention", "graphs"))) for width in wanted]
    assert set(needed) > {1, 4}
    assert (target.model_runner.attn_backend, target.model_runner.decode_cuda_graph_runner) == ("attention", "graphs")


@pytest.mark.parametrize("adaptive", [False, True])
def test_sampled_rounds_equal_the_rule_applied_token_by_token(monkeypatch, adaptive):
    """Seeded requests, so that every draw is known, among greedy ones."""
    worker = make_worker(monkeypatch, 3, adaptive=adaptive)
    if adaptive:
        worker.depths = RandomDepths(worker.settings, seed=1)
    host = Host(worker, seed=20)
    play(host, 200, sampled=True)
    assert set(host.accepted) == {0, 1, 2, 3}


class ToldTexts(LookUps):
    """Looks up what the target itself will say, as often as not with a mistake: windows accepted to any length."""

    def __init__(self, longest, host):
        super().__init__(longest)
        self.host, self.told = host, {}

    def begin(self, pool_idx, rid, tokens):
        super().begin(pool_idx, rid, tokens)
        self._texts[pool_idx].look_up = lambda drafts, count: self.tell(pool_idx, drafts, count)

    def tell(self, pool_idx, drafts, count):
        (request,) = [r for r in self.host.decoding if r.pool_idx == pool_idx]
        definition, told = Definition(request.tokens), []
        while len(told) < count:
            token = int(definition.target(drafts + told).argmax())
            told.append(token if self.host.chance.random() < 0.95 else (token + 1) % VOCAB)
        self.told[request.rid] = told if self.host.chance.random() < 0.8 else []
        return self.told[request.rid]


class ToldHost(Host):
    """A host whose worker looks up `ToldTexts`."""

    def __init__(self, worker, seed):
        super().__init__(worker, seed)
        texts = ToldTexts(worker.settings.num_draft_tokens - 1, self)
        worker.store = replace(worker.store, texts=texts)
        self.looked_up = lambda request, count: texts.told[request.rid]
        self.decoding = []

    def round(self, requests):
        self.decoding = requests
        super().round(requests)


@pytest.mark.parametrize("steps, look_ups", [(1, 4), (2, 1), (3, 8)])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_rounds_with_looked_up_drafts_equal_a_full_recompute(monkeypatch, steps, look_ups, adaptive, sampled):
    worker = make_worker(monkeypatch, steps, adaptive=adaptive, look_ups=look_ups)
    if adaptive:
        worker.depths = RandomDepths(worker.settings, seed=steps)
    host = ToldHost(worker, seed=30 + steps)
    play(host, 160, sampled, every=True)
    assert set(host.accepted) >= {0, steps} and steps + look_ups in host.offered
    assert max(host.accepted) > steps or sampled


def test_the_window_keeps_its_full_width_where_graphs_need_it(monkeypatch):
    worker = make_worker(monkeypatch, 3, full_width=True, look_ups=5)
    host = ToldHost(worker, seed=40)
    play(host, 120, every=True)
    assert set(host.accepted) >= {0, 3} and max(host.accepted) > 3


def test_what_is_looked_up_is_what_followed_in_the_text(monkeypatch):
    """Two tokens have to have occurred before, among thirteen; the host looks them up by brute force."""
    monkeypatch.setattr(lookup, "NGRAM", 2)
    worker = make_worker(monkeypatch, 1, adaptive=True, look_ups=3)
    worker.depths = RandomDepths(worker.settings, seed=3)
    host = Host(worker, seed=50)
    host.looked_up = lambda request, count: continuation(request.tokens, request.drafts, count, ngram=2)
    play(host, 200, every=True)
    assert host.offered.count(4) > 10 and host.offered.count(1) > 10
