"""Requests that share prefixes at random, and what a server with a small prefix cache makes of them.

The rounds are generated against a server without a cache (`record`), because later requests
continue earlier answers, and replayed on servers with one (`replay`): ids and accepted drafts must
be the same.
"""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from tests.support.nano_model import generate, histogram, prompts

WINDOW, CHUNK, PAGES = 64, 64, (1, 16)  # 64: the nano checkpoint's sliding window
LONGEST = 420  # tokens of a prompt
REMEMBERED, RECENT = 48, 8  # sequences a later request may continue
AT_ONCE = 8
COMMON_ARGS = (
    *NANO_ARGS, *MTP_ARGS, "--dtype", "float32", "--chunked-prefill-size", str(CHUNK),
    "--max-running-requests", str(AT_ONCE), "--enable-metrics",
)  # fmt: skip
# Of flags given twice the last one counts.
OFF_ARGS = (*COMMON_ARGS, "--disable-radix-cache")
SMALL_ARGS = (*COMMON_ARGS, "--max-total-tokens", "2048", "--swa-full-tokens-ratio", "0.25")
HOST_ARGS = (*SMALL_ARGS, "--enable-hierarchical-cache", "--hicache-ratio", "4")
COUNTER = re.compile(r"^sglang:evicted_tokens_total\{.*\} (\S+)$", re.M)


@dataclass(frozen=True)
class Case:
    """One request: prompt and number of tokens to generate."""

    ids: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Outcome:
    """What must not depend on the cache, and what tells whether the comparison means anything."""

    ids: tuple[int, ...]
    accepted: tuple[int, ...]  # rounds that accepted 0, 1, 2, 3 drafts
    cached: int
    retractions: int
    loaded: int = 0  # of the cached tokens, those that came from host memory or a file


@dataclass
class Report:
    """Totals of a replay; `problems` describes the requests that differ."""

    requests: int = 0
    hits: int = 0
    cached_tokens: int = 0
    loaded_tokens: int = 0
    retracted: int = 0
    differing_ids: int = 0
    differing_histograms: int = 0
    evicted_tokens: float = 0
    problems: list[str] = field(default_factory=list)


class PrefixTree:
    """Random requests over a growing set of sequences.

    A request keeps a random part of a known sequence, cut where caches have edges (pages, windows,
    chunks, a few tokens to either side), and goes on with new tokens or with none.
    """

    def __init__(self, seed: int):
        self.chance = random.Random(seed)
        self.known: list[list[int]] = [[]]

    def round(self) -> list[Case]:
        """Requests to send at once."""
        size = self.chance.choice([1, 1, 2, 3, 5, AT_ONCE, 2 * AT_ONCE])
        return [self._case() for _ in range(size)]

    def learn(self, case: Case, output: tuple[int, ...]) -> None:
        self.known.append([*case.ids, *output])
        if len(self.known) > REMEMBERED:
            # The eldest stays more often than not, so that old prefixes return after an eviction.
            self.known.pop(self.chance.choice([0, *range(1, REMEMBERED, 7)]))

    def _case(self) -> Case:
        recent = self.known[-RECENT:]  # likely still cached
        base = self.chance.choice(recent if self.chance.random() < 0.7 else self.known)
        kept = base[: self._cut(len(base))]
        ids = (kept + self._new_tokens(self._extra()))[:LONGEST]
        return Case(tuple(ids or [77]), self.chance.choice([1, 2, 3, 5, 8, 13, 24, 40]))

    def _cut(self, length: int) -> int:
        edge = self.chance.choice((*PAGES, WINDOW, WINDOW, CHUNK))
        near = self.chance.randrange(length // edge + 1) * edge + self.chance.randrange(-4, 5)
        return max(0, min(length, self.chance.choice([length, length, near, near])))

    def _extra(self) -> int:
        edge = self.chance.choice([0, PAGES[1], WINDOW, CHUNK, WINDOW + CHUNK])
        return max(0, edge + self.chance.randrange(-4, 9))

    def _new_tokens(self, count: int) -> list[int]:
        kind = self.chance.random()
        if kind < 0.5:  # code, whose drafts are accepted
            text = self.chance.choice(prompts())
            start = self.chance.randrange(len(text))
            return (text[start:] + text)[:count]
        if kind < 0.75:
            return [self.chance.randrange(20, 2000) for _ in range(count)]
        # Few different tokens: lookahead keys that differ in their last token only.
        return [self.chance.randrange(500, 503) for _ in range(count)]


def ask(server, cases: list[Case]) -> list[Outcome]:
    """All cases at once."""
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: generate(server, list(case.ids), case.count), cases))
    return [outcome(answer) for answer in answers]


def outcome(answer: dict) -> Outcome:
    meta = answer["meta_info"]
    retractions = meta.get("num_retractions") or 0
    ids, accepted = tuple(answer["output_ids"]), tuple(histogram(answer))
    sources = meta.get("cached_tokens_details") or {}
    loaded = sum(tokens for source, tokens in sources.items() if source in ("host", "storage"))
    return Outcome(ids, accepted, meta["cached_tokens"], retractions, loaded)


def record(server, count: int, seed: int) -> list[tuple[list[Case], list[Outcome]]]:
    """At least `count` requests in rounds, with the answers of a server without a cache."""
    tree, rounds, sent = PrefixTree(seed), [], 0
    while sent < count:
        cases = tree.round()
        outcomes = ask(server, cases)
        for case, found in zip(cases, outcomes, strict=True):
            tree.learn(case, found.ids)
        rounds.append((cases, outcomes))
        sent += len(cases)
    return rounds


def replay(server, rounds: list[tuple[list[Case], list[Outcome]]]) -> Report:
    """The same rounds on a server with a cache.

    A request that was retracted starts its rounds anew behind what it had generated, so only its
    ids are compared.
    """
    report = Report()
    for number, (cases, expected) in enumerate(rounds):
        for case, want, found in zip(cases, expected, ask(server, cases), strict=True):
            _count(report, f"round {number}", case, want, found)
    report.evicted_tokens = evicted_tokens(server)
    return report


def _count(report: Report, name: str, case: Case, want: Outcome, found: Outcome) -> None:
    report.requests += 1
    report.hits += found.cached > 0
    report.cached_tokens += found.cached
    report.loaded_tokens += found.loaded
    report.retracted += found.retractions > 0
    same_ids = found.ids == want.ids
    same_rounds = found.accepted == want.accepted or found.retractions or want.retractions
    report.differing_ids += not same_ids
    report.differing_histograms += not same_rounds
    if not (same_ids and same_rounds):
        report.problems.append(f"{name}: prompt {list(case.ids)}\n  without cache {want}\n  with     {found}")


def evicted_tokens(server) -> float:
    """Tokens the prefix cache gave up so far, by SGLang's own counter."""
    return sum(float(value) for value in COUNTER.findall(server.metrics()))
