"""The acceptance watchdog: quiet on nano's own rounds in any mixture, loud once where acceptance collapses.

ROUNDS are accepted drafts, round by round, of 64 tokens of greedy nano in the offline loop of
`tests/support/reference.py` (`speculative_greedy`): 20 held-out prompts, 4 of random ids, two of patterns.
"""

import itertools
import logging
import math
import random
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from sglang_step35.speculative import watchdog
from sglang_step35.speculative.watchdog import CAUSES, Alarm, History, Watchdog, WatchdogSettings, causes
from tests.support.toy_requests import ToyRequest
from tests.support.worker_host import Host, make_worker

ROUNDS = """
0333033303331333333 02003333313203333333 01013003233330330333300 30033231333330023323 01020003001000130313323030233
33331303023023203212210 100002220333031013123110310 300113122302222331011133 1103230322333333030333 3133330333330223333
0333333330130333323 13100201230331103301230211 23023333333333333 11323000333333333333 11101323130323031032333
3333330332012033333 333230333033033003303 00233130133333333333 12001303332111223333 33323113333333333321
01001033333333333333 00333333303330333033 2130022100320000013302300333 10122222013333333333 2320000000333333333333
200300100300120030030030030
""".split()
DRAFTED, AT_ONCE = 3, 16


def request(rid: str = "a", **fields) -> SimpleNamespace:
    """What the watchdog reads of SGLang's Req."""
    params = dict(top_k=1, frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0)
    params |= fields.pop("params", {})
    defaults = dict(
        rid=rid,
        cached_tokens=0,
        cached_tokens_host=0,
        cached_tokens_storage=0,
        retraction_count=0,
        origin_input_ids=[1] * 10,
        output_ids=[],
        grammar=None,
        custom_logit_processor=None,
        sampling_params=SimpleNamespace(**params),
    )
    return SimpleNamespace(**defaults | fields)


class Traffic:
    """Requests with causes drawn at random and rounds of nano's, AT_ONCE at a time."""

    def __init__(self, dog: Watchdog, seed: int):
        self.dog, self.chance = dog, random.Random(seed)
        self.rounds = self.count = 0

    def serve(self, requests: int, hurt=lambda req: False) -> None:
        """So many requests; those that `hurt` says accept each draft half as often as they did."""
        live: list[tuple] = []
        end = self.count + requests
        while live or self.count < end:
            while len(live) < AT_ONCE and self.count < end:
                live.append(self._admit())
            kept = [self._kept(req, rounds, hurt(req)) for req, rounds, _ in live]
            self.dog.begin_round([req for req, _, _ in live], [DRAFTED] * len(live))
            self.dog.observe(kept)
            self.rounds += len(live)
            live = [(q, rounds, left - n - 1) for (q, rounds, left), n in zip(live, kept) if left > n + 1]

    def _admit(self) -> tuple:
        chance, self.count = self.chance, self.count + 1
        req = request(
            str(self.count),
            cached_tokens=50 * (chance.random() < 0.5),
            cached_tokens_host=50 * (chance.random() < 0.1),
            retraction_count=int(chance.random() < 0.1),
            origin_input_ids=range(40_000 if chance.random() < 0.1 else 10),
            params={"top_k": chance.choice([1, 1, 1 << 30])},
        )
        return req, itertools.cycle(map(int, chance.choice(ROUNDS))), chance.choice([16, 48, 64, 64, 128])

    def _kept(self, req, rounds, hurt: bool) -> int:
        kept = next(rounds)
        sound = [self.chance.random() < 0.5 for _ in range(kept)] if hurt else []
        return sound.index(False) if False in sound else kept


def warned(caplog) -> list[str]:
    """The causes warned of, in order."""
    return [record.args[0] for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("seed", range(4))
def test_ordinary_mixed_traffic_is_not_worth_a_warning(caplog, seed):
    traffic = Traffic(Watchdog(), seed)
    traffic.serve(600)
    assert traffic.rounds > 10_000 and warned(caplog) == []
    assert all(history.share < 0.25 for history in traffic.dog.histories.values() if history.judged > 50)


def after_a_hit(req) -> bool:
    return bool(req.cached_tokens) and not req.cached_tokens_host


@pytest.mark.parametrize("seed", range(3))
def test_a_collapse_after_cache_hits_is_said_once_and_by_its_name(caplog, seed):
    traffic = Traffic(Watchdog(), seed)
    traffic.serve(300)
    traffic.serve(100, after_a_hit)
    assert watchdog.CACHE_HIT in warned(caplog)
    # The server's own history may say it too, no other cause.
    assert Counter(warned(caplog)) <= Counter([watchdog.CACHE_HIT, watchdog.HISTORY])
    assert "--disable-radix-cache" in caplog.text
    traffic.serve(200)
    assert not traffic.dog.alarms[watchdog.CACHE_HIT].on
    traffic.serve(100, after_a_hit)
    assert warned(caplog).count(watchdog.CACHE_HIT) == 2, "a new episode"


def test_a_collapse_from_the_first_request_on_is_noticed_by_those_without_the_cause(caplog):
    Traffic(Watchdog(), 0).serve(500, after_a_hit)
    assert warned(caplog)[:1] == [watchdog.CACHE_HIT]


@pytest.mark.parametrize(
    "cause, hurt",
    [
        (watchdog.HOST_LOAD, lambda req: req.cached_tokens_host),
        (watchdog.RETRACTION, lambda req: req.retraction_count),
        (watchdog.LONG_CONTEXT, lambda req: len(req.origin_input_ids) > 40_000 - 1),
        (watchdog.SAMPLING, lambda req: req.sampling_params.top_k > 1),
    ],
)
def test_every_cause_is_told_apart(caplog, cause, hurt):
    traffic = Traffic(Watchdog(), 5)
    traffic.serve(600)
    traffic.serve(500, hurt)
    assert cause in warned(caplog)
    assert set(warned(caplog)) <= {cause, watchdog.HISTORY}


def test_a_collapse_of_everything_is_one_of_the_servers_history(caplog):
    traffic = Traffic(Watchdog(), 1)
    traffic.serve(300)
    traffic.serve(60, lambda req: True)
    assert watchdog.HISTORY in warned(caplog)


def test_causes_of_a_request():
    def found(**fields) -> set[str]:
        return set(causes(request(**fields), long_context=100))

    assert found() == set()
    assert found(cached_tokens=5) == {watchdog.CACHE_HIT}
    # A prefix loaded from host memory is not one that stayed in the pool.
    assert found(cached_tokens=9, cached_tokens_host=4) == found(cached_tokens=9, cached_tokens_storage=9)
    assert found(cached_tokens=9, cached_tokens_host=4) == {watchdog.HOST_LOAD}
    assert found(retraction_count=1) == {watchdog.RETRACTION}
    assert found(output_ids=[1] * 89) == set() and found(output_ids=[1] * 90) == {watchdog.LONG_CONTEXT}
    assert found(params={"top_k": 50}) == {watchdog.SAMPLING}
    assert found(grammar=object()) == found(params={"presence_penalty": 0.5}) == {watchdog.RULED}


def test_evidence_is_the_ratio_of_the_two_likelihoods():
    history = History(memory=10**6)
    for accepted in (0, 1, 3, 3, 2, 3, 0, 3):
        history.add(DRAFTED, accepted, 10)
    rates = [61 / 82, 51 / 62, 41 / 52]  # of 80, 60 and 50 reached, with one more of either kind

    def likelihood(accepted: int, factor: float) -> float:
        chance = math.prod(factor * rate for rate in rates[:accepted])
        return chance * (1 - factor * rates[accepted] if accepted < DRAFTED else 1.0)

    for accepted in range(DRAFTED + 1):
        ratio = likelihood(accepted, 0.4) / likelihood(accepted, 1.0)
        assert history.evidence(DRAFTED, accepted, 0.4) == pytest.approx(math.log(ratio))
        assert history.expected(DRAFTED, accepted) == pytest.approx(sum(rates[: accepted + 1]))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_false_alarms_are_as_rare_as_promised(share):
    """Without a fault, requests collapse with this chance: 200 on average before the sum passes log(200), at least."""
    chance, lengths = random.Random(3), []
    for _ in range(150):
        alarm, length = Alarm(), 1
        while not alarm.add_verdict(chance.random() < share, share, math.log(200)):
            length += 1
        lengths.append(length)
    assert sum(lengths) / len(lengths) > 200


def test_a_fault_is_found_within_some_ten_requests():
    chance = random.Random(4)
    for _ in range(50):
        alarm, length = Alarm(), 1
        threshold = math.log(WatchdogSettings().requests_to_false_alarm)
        while not alarm.add_verdict(chance.random() < 0.9, 0.1, threshold):
            length += 1
        assert length <= 25


@dataclass
class Totals:
    """Where figures go, in place of Prometheus."""

    accepted: Counter
    verdicts: Counter

    def add_drafts(self, cause, accepted, expected):
        self.accepted[cause] += accepted

    def add_verdict(self, cause, collapsed):
        self.verdicts[cause, collapsed] += 1

    def set_alarm(self, cause, collapsed):
        assert cause in CAUSES and not collapsed


def test_looked_up_drafts_and_rounds_without_drafts_say_nothing_of_the_layers():
    totals = Totals(Counter(), Counter())
    dog = Watchdog(report=totals)
    for _ in range(40):
        dog.begin_round([request("a"), request("b")], [DRAFTED, 0])
        dog.observe([DRAFTED + 5, 4])
    assert totals.accepted == {watchdog.HISTORY: 40 * DRAFTED}
    assert totals.verdicts == {(watchdog.HISTORY, False): 1}, "a request is judged once"


def test_the_worker_reports_every_round_of_every_request(monkeypatch):
    worker = make_worker(monkeypatch, 3)
    totals = Totals(Counter(), Counter())
    worker.watchdog.report = totals
    host = Host(worker)
    live: list[ToyRequest] = [host.admit([5, 9, 2, 7] * 3), host.admit([3, 1, 4, 1, 5, 9])]
    live[1].cached_tokens = 3
    host.prefill({r: len(r.tokens) for r in live})
    for _ in range(20):
        host.round(live)
    assert totals.accepted[watchdog.HISTORY] == sum(host.accepted) > 0
    assert {frozenset(), frozenset([watchdog.CACHE_HIT])} == set(worker.watchdog.histories)
