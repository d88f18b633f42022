"""The Prometheus example and the Grafana dashboard against what a real server exposes."""

import json
import re
from collections import defaultdict

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sglang_step35.assets import CONFIGS
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS

METRICS_ARGS = (*NANO_ARGS, *MTP_ARGS, "--enable-metrics", "--enable-cache-report")
SELECTOR = re.compile(r"(?:by \((?P<groups>[^)]*)\) \((?:rate\()?)?(?P<name>sglang:\w+)(?:\{(?P<labels>[^}]*)\})?")


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads((CONFIGS / "grafana-dashboard.json").read_text())


def expressions(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def used(dashboard: dict) -> dict[str, set[str]]:
    """Metric names of all panels, each with the labels it is selected and grouped by."""
    found = defaultdict(set)
    for expression in expressions(dashboard):
        for match in SELECTOR.finditer(expression):
            groups = re.findall(r"\w+", match["groups"] or "")
            found[match["name"]].update(groups, re.findall(r"(\w+)\s*[=!]~?\"", match["labels"] or ""))
    return dict(found)


@pytest.fixture(scope="module")
def exposed(serve) -> dict[str, set[str]]:
    """Sample names of a real server, with their labels, after requests that draft and hit the prefix cache."""
    server = serve(*METRICS_ARGS)
    body = {"model": "step3p5-nano", "prompt": "def add(a, b):\n    return a + b\n" * 8, "max_tokens": 24}
    for stream in (False, True):  # times between tokens are only measured on streams
        options = {"temperature": 0, "ignore_eos": True, "stream": stream}
        server.post("/v1/completions", body | options).raise_for_status()
    server.post("/v1/completions", {"no": "prompt"})  # an error to count
    found = defaultdict(set)
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return dict(found)


@pytest.mark.server
def test_every_metric_of_the_dashboard_is_exposed(dashboard, exposed):
    assert set(used(dashboard)) - set(exposed) == set()


@pytest.mark.server
def test_every_label_of_the_dashboard_is_exposed(dashboard, exposed):
    wrong = {n: labels - exposed[n] for n, labels in used(dashboard).items() if n in exposed and labels - exposed[n]}
    assert wrong == {}


def test_dashboard_shows_what_an_operator_of_this_model_asks_for(dashboard):
    names = set(used(dashboard))
    assert {"sglang:full_token_usage", "sglang:swa_token_usage"} <= names  # KV use by kind of layer
    assert {"sglang:cached_tokens_total", "sglang:prompt_tokens_total"} <= names  # cache hits
    assert {"sglang:spec_verify_calls_total", "sglang:generation_tokens_total"} <= names  # accept length
    assert {"sglang:spec_accepted_drafts_total", "sglang:spec_offered_drafts_total"} <= names  # by position


def test_dashboard_panels_have_their_own_ids_and_places(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24  # Grafana's grid


def test_counters_are_only_read_as_rates(dashboard):
    for expression in expressions(dashboard):
        for counter in re.finditer(r"sglang:\w+_(?:total|bucket)\b", expression):
            assert expression[: counter.start()].endswith("rate("), expression


def test_prometheus_example_scrapes_the_metrics_path():
    config = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["localhost:8000"]}]
