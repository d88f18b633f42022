"""The serving benchmark's arithmetic, its reading of streams and counters, and its report."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sglang_step35.bench import metrics, plots, stats
from sglang_step35.bench.stream import Answer, BadStream, Result
from sglang_step35.cli import bench as bench_serving
from tests.support.sse import DONE, FINISH, delta, event

# --- statistics, by hand


def test_percentiles_interpolate_between_ranks():
    values = [40.0, 10.0, 30.0, 20.0]
    assert stats.percentile(values, 0) == 10
    assert stats.percentile(values, 50) == 25
    assert stats.percentile(values, 95) == pytest.approx(38.5)  # rank 2.85
    assert stats.percentile([7.0], 99) == 7


def test_spread_is_in_milliseconds_and_none_without_values():
    assert stats.spread([0.1, 0.3]) == stats.Spread(mean=200, p50=200, p95=290, p99=298)
    assert stats.spread([]) is None


def test_time_per_token_leaves_the_first_token_out():
    assert stats.time_per_token(Result(ttft=0.5, latency=2.5, tokens=5)) == 0.5
    assert stats.time_per_token(Result(ttft=0.5, latency=0.5, tokens=1)) is None


def test_acceptance_from_histograms_of_rounds():
    # 10 rounds: 4 accepted nothing, 3 one draft, 1 two, 2 all three
    results = [
        Result(rounds=6, accepted=3, histogram=(4, 1, 1)),
        Result(rounds=4, accepted=8, histogram=(0, 2, 0, 2)),
        Result(tokens=3),
    ]
    assert stats.acceptance(results) == [0.6, 0.3, 0.2]
    assert stats.accept_length(results) == pytest.approx(2.1)
    assert stats.acceptance([Result()]) is None
    assert stats.accept_length([Result()]) is None


def test_cache_hit_rate_weighs_by_prompt_tokens():
    results = [Result(prompt_tokens=100, cached_tokens=90), Result(prompt_tokens=300, cached_tokens=10), Result()]
    assert stats.cache_hit_rate(results) == 0.25
    assert stats.cache_hit_rate([Result(prompt_tokens=5)]) is None


def test_summary_counts_errors_and_measures_what_succeeded():
    good = Result(ttft=0.1, latency=0.5, tokens=5)
    results = [good, Result(error="timeout"), Result(error="http 500"), Result(error="timeout")]
    cell = stats.summarize("chat", 2, results, 2.0, {})
    assert cell.errors == {"timeout": 2, "http 500": 1}
    assert (cell.requests, cell.failed, cell.tokens, cell.tokens_per_second) == (4, 3, 5, 2.5)
    assert (cell.ttft.p50, cell.tpot.p50, cell.latency.p99) == (100, 100, 500)
    assert (cell.accept_length, cell.acceptance, cell.cache_hit_rate) == (None, None, None)


def test_summary_of_failures_only():
    cell = stats.summarize("chat", 1, [Result(error="connect")], 1.0, {})
    assert (cell.tokens_per_second, cell.ttft, cell.failed) == (0, None, 1)


# --- counters of servers

SGLANG_BEFORE = """
sglang:prompt_tokens_total{is_streaming="true",model_name="m"} 100.0
sglang:generation_tokens_total{is_streaming="true",model_name="m"} 40.0
sglang:num_requests_total{model_name="m"} 4.0
sglang:spec_verify_calls_total{model_name="m"} 12.0
"""
SGLANG_AFTER = """
sglang:prompt_tokens_total{is_streaming="true",model_name="m"} 250.0
sglang:prompt_tokens_total{is_streaming="false",model_name="m"} 50.0
sglang:generation_tokens_total{is_streaming="true",model_name="m"} 92.0
sglang:num_requests_total{model_name="m"} 6.0
sglang:spec_verify_calls_total{model_name="m"} 32.0
sglang:cached_tokens_total{cache_source="device",model_name="m"} 50.0
sglang:spec_offered_drafts_total{position="1"} 20.0
sglang:spec_offered_drafts_total{position="2"} 10.0
sglang:spec_accepted_drafts_total{position="1"} 15.0
sglang:spec_accepted_drafts_total{position="2"} 5.0
"""
VLLM_AFTER = """
vllm:prefix_cache_queries_total{engine="0"} 80.0
vllm:prefix_cache_hits_total{engine="0"} 20.0
vllm:spec_decode_num_drafts_total{engine="0"} 10.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 12.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 4.0
"""


def test_difference_of_sglang_counters():
    change = metrics.difference(metrics.parse(SGLANG_BEFORE), metrics.parse(SGLANG_AFTER))
    assert metrics.cache_hit_rate(change) == 0.25  # 50 of 200 prompt tokens
    assert metrics.accept_length(change) == 2.5  # 52 tokens, 2 of them from prefills, in 20 rounds
    assert metrics.acceptance(change) == [0.75, 0.5]


def test_difference_of_vllm_counters():
    change = metrics.difference({}, metrics.parse(VLLM_AFTER))
    assert metrics.cache_hit_rate(change) == 0.25
    assert metrics.accept_length(change) == 2.2
    assert metrics.acceptance(change) == [0.8, 0.4]


def test_no_counters_no_claims():
    change = metrics.difference(None, metrics.parse(SGLANG_AFTER))
    assert metrics.cache_hit_rate(change) is metrics.accept_length(change) is metrics.acceptance(change) is None


# --- streams


def feed(*lines: bytes) -> Result:
    answer = Answer()
    for i, line in enumerate(lines):
        answer.feed(line, now=float(i))
    return answer.result()


def test_first_token_is_the_first_that_shows():
    usage = event(choices=[], usage={"completion_tokens": 9, "prompt_tokens": 4})
    result = feed(
        delta(role="assistant", content=""), b": ping\n", delta(reasoning_content="a"), b"\n", delta(content="b"),
        FINISH, usage, DONE,
    )  # fmt: skip
    assert (result.ttft, result.latency, result.tokens, result.prompt_tokens) == (2, 5, 9, 4)
    assert (result.text, result.finish, result.cached_tokens) == ("b", "stop", None)


def test_chunks_stand_in_for_missing_usage():
    result = feed(delta(content="a"), delta(content="b"), FINISH, DONE)
    assert (result.tokens, result.tokens_counted) == (2, False)


def test_tool_calls_are_counted_once_each():
    call = [{"index": 0, "function": {"name": "run", "arguments": ""}}]
    more = [{"index": 0, "function": {"arguments": "{}"}}, {"index": 1, "function": {"name": "search"}}]
    assert feed(delta(tool_calls=call), delta(tool_calls=more), FINISH, DONE).tool_calls == 2


def test_speculation_of_sglang_and_of_llama_cpp():
    details = {"spec_verify_ct": 3, "spec_num_correct_drafts": 4, "spec_correct_drafts_histogram": [1, 1, 0, 1]}
    ours = feed(delta(content="a"), FINISH, event(choices=[], sglext={"spec_tokens_details": details}), DONE)
    assert (ours.rounds, ours.accepted, ours.histogram) == (3, 4, (1, 1, 0, 1))
    timings = {"predicted_n": 10, "draft_n": 12, "draft_n_accepted": 6}
    theirs = feed(delta(content="a"), event(choices=[{"delta": {}, "finish_reason": "stop"}], timings=timings), DONE)
    assert (theirs.rounds, theirs.accepted, theirs.histogram) == (4, 6, None)


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("malformed", [b"data: {broken\n"]),
        ("malformed", [b"data: 17\n"]),
        ("error event", [event(error={"message": "out of memory"})]),
        ("truncated", [delta(content="a")]),
        ("empty", [DONE]),
    ],
)
def test_bad_streams_are_named(kind, lines):
    with pytest.raises(BadStream) as caught:
        feed(*lines)
    assert caught.value.kind == kind


# --- reports


def fixture_run(label: str, speed: float, speculates: bool) -> stats.Run:
    shape = {"rounds": 4, "accepted": 6, "histogram": (1, 1, 1, 1)} if speculates else {}
    good = Result(ttft=0.1, latency=0.1 + 10 / speed, tokens=11, prompt_tokens=10, cached_tokens=3, **shape)
    cells = [
        stats.summarize(name, level, [good, replace(good, error=error)], 11 / speed, {})
        for name, error in (("code", None), ("chat", "http 500"))
        for level in (1, 4)
    ]
    return stats.Run(label, "m", "sglang", "2026-01-01 00:00 UTC", {"tokens": 11}, tuple(cells))


@pytest.fixture
def files(tmp_path) -> list[Path]:
    runs = [fixture_run("plain <off>", 50, False), fixture_run("three heads", 100, True)]
    paths = [tmp_path / f"{i}.json" for i in range(2)]
    for path, run in zip(paths, runs, strict=True):
        path.write_text(json.dumps(stats.run_to_json(run)))
    return paths


def test_report_compares_runs_in_one_file(files, tmp_path, capsys):
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    bench_serving.main(["report", *map(str, files), "--html", str(page), "--png", str(picture)])
    text = page.read_text()
    assert "plain &lt;off&gt;" in text and "three heads" in text
    assert "<off>" not in text
    assert "1 http 500" in text and "2.50" in text and "0.75 0.50 0.25" in text
    assert '<td class="up">2.00</td>' in text
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]+)""", text)
    assert links and all(link.startswith("data:") for link in links)
    assert not re.search(r"https?://|@import|url\(", re.sub(r"base64,[^\"]+", "", text))
    assert picture.read_bytes().startswith(b"\x89PNG")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["run"] for row in last["results"]} == {"plain <off>", "three heads"}


def test_runs_survive_a_file(files):
    run = fixture_run("three heads", 100, True)
    assert stats.run_from_json(json.loads(json.dumps(stats.run_to_json(run)))) == run


def test_other_formats_and_keys_are_refused():
    data = stats.run_to_json(fixture_run("a", 1, False))
    with pytest.raises(ValueError, match="format 0"):
        stats.run_from_json(data | {"format": 0})
    with pytest.raises(ValueError, match="surprise"):
        stats.run_from_json(data | {"surprise": 1})


def test_a_run_without_speculation_has_no_position_plot():
    assert plots.positions([fixture_run("a", 1, False)]) is None
