"""A running server says when its acceptance collapses: MTP KV of cached prefixes overwritten with noise on purpose."""

import re

import pytest

from tests.serving.test_metrics import METRICS_ARGS
from tests.support.nano_model import generate_all, greedy, histogram, prompts, random_ids
from tests.support.plugins import install_plugin

pytestmark = pytest.mark.server
TOKENS = 48


def mixed() -> list[list[int]]:
    return prompts()[60:86] + random_ids(4, 60, seed=4)


def gauges(server) -> dict[str, float]:
    """The causes whose acceptance the server says has collapsed, or not."""
    found = re.findall(r'^sglang:spec_collapse\{cause="(\w+)".*\} (\S+)$', server.metrics(), re.M)
    return {cause: float(on) for cause, on in found}


def judged(server, cause: str) -> float:
    (count,) = re.findall(rf'^sglang:spec_judged_requests_total\{{cause="{cause}".*\}} (\S+)$', server.metrics(), re.M)
    return float(count)


def warnings(server) -> list[str]:
    return re.findall(r"acceptance of MTP drafts has collapsed \((\w+)\)", server.log.read_text())


def test_ordinary_traffic_hits_and_samples_without_a_warning(serve):
    server = serve(*METRICS_ARGS)
    server.flush_cache()
    answers = generate_all(server, mixed(), TOKENS)
    answers += generate_all(server, mixed(), TOKENS)
    answers += generate_all(server, mixed(), TOKENS, temperature=0.8)
    answers += generate_all(server, mixed()[:8], TOKENS, presence_penalty=0.5)
    assert sum(sum(histogram(a)) for a in answers) > 1200, "rounds"
    assert judged(server, "cache_hit") > 25 and judged(server, "sampling") > 20
    assert warnings(server) == [] and set(gauges(server).values()) == {0.0}


def test_corrupt_kv_of_cached_prefixes_is_said_once(serve, tmp_path):
    server = serve(*METRICS_ARGS, "--dtype", "float32", PYTHONPATH=install_plugin("corrupting_plugin", tmp_path))
    cold, hits = (generate_all(server, mixed(), TOKENS) for _ in range(2))
    assert [a["output_ids"] for a in hits] == [a["output_ids"] for a in cold], "no answer shows it"
    assert hits[0]["output_ids"] == greedy(tuple(mixed()[0]), TOKENS)
    assert warnings(server) == ["cache_hit"]
    assert {cause for cause, on in gauges(server).items() if on} == {"cache_hit"}
