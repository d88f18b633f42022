"""The breakdown of a round against traces made by hand, and the worker's spans in a real one."""

import gzip
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from scripts.gpu_check import profile
from scripts.gpu_check.options import Setting
from scripts.gpu_check.trace import Breakdown, NoRounds, breakdown, read
from sglang_step35.speculative.spans import MTP, PREFILL, ROUND, VERIFY, WIDTH, spanned
from tests.support.worker_host import Host, make_worker


def span(name: str, start: float, length: float) -> dict:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": length}


def kernel(number: int, launch: float, start: float, length: float, how: str = "cudaLaunchKernel") -> list[dict]:
    args = {"correlation": number}
    return [
        {"ph": "X", "cat": "cuda_runtime", "name": how, "ts": launch, "dur": 1, "args": args},
        {"ph": "X", "cat": "kernel", "name": f"k{number}", "ts": start, "dur": length, "args": args},
    ]


def host_round(start: float) -> list[dict]:
    """100 us in the worker: verify 10 to 40, MTP 50 to 90."""
    return [span(ROUND, start, 100), span(VERIFY, start + 10, 30), span(MTP, start + 50, 40)]


def test_on_a_cpu_the_spans_are_the_times():
    events = [event for start in (0, 150, 300) for event in host_round(start)]
    assert breakdown(events) == Breakdown("cpu", 2, round=0.15, verify=0.03, mtp=0.04, other=0.03, gap=0.05, host=0.1)


def test_a_prefill_between_rounds_is_no_gap():
    events = [*host_round(0), *host_round(150), span(PREFILL, 260, 500), *host_round(800), *host_round(950)]
    assert breakdown(events).round == 0.15
    assert breakdown(events).rounds == 2


def test_rounds_are_told_apart_by_the_tokens_they_verify():
    events = [event for start in (0, 150, 300, 600) for event in host_round(start)]
    events += [span(f"{WIDTH}4", 9, 32), span(f"{WIDTH}1", 159, 32), span(f"{WIDTH}1", 309, 32)]
    assert breakdown(events, width=4).round == 0.15
    assert (breakdown(events, width=1).rounds, breakdown(events, width=1).round) == (2, 0.225)
    with pytest.raises(NoRounds, match="4 rounds in the trace, none that verifies 2 tokens"):
        breakdown(events, width=2)


def test_each_width_is_traced_by_requests_that_allow_so_many_drafts(tmp_path, monkeypatch):
    """The controller may draft fewer in some rounds, which do not count."""
    log = tmp_path / "server.log"
    log.write_text("Verify graphs of 1 tokens: 0.21 GB\nNo verify graphs of 2 tokens: 0.21 GB expected\n")

    def traced(server, setting, concurrency, folder, custom_params):
        width = custom_params["speculative_depth"] + 1
        rounds = [(0, 1), (150, width), (350, width), (600, width)]
        events = [event for start, _ in rounds for event in host_round(start)]
        events += [span(f"{WIDTH}{wide}", start + 9, 32) for start, wide in rounds]
        file = tmp_path / f"{width}.trace.json"
        file.write_text(json.dumps({"traceEvents": events}))
        return file

    kinds = []
    server = lambda setting, kind: kinds.append(kind) or nullcontext(SimpleNamespace(log=log))
    monkeypatch.setattr(profile, "served_kind", server)
    monkeypatch.setattr(profile, "traced", traced)
    found = profile.run_adaptive(Setting(tmp_path))
    assert kinds == ["adaptive"] and found["captured"] == {"1": 0.21}
    assert [(row["concurrency"], row["width"], row["rounds"]) for row in found["rounds"]] == [
        (8, 1, 3), (8, 2, 2), (8, 3, 2), (8, 4, 2)
    ]  # fmt: skip
    assert found["rounds"][3]["round"] == 0.225


def gpu_round(number: int, start: float, late: float) -> list[dict]:
    """Kernels run `late` after their launch: a verify graph of two kernels, an eager one, an MTP graph."""
    graph = {"how": "cudaGraphLaunch"}
    return [
        *host_round(start),
        *kernel(number, start + 12, start + late, 200, **graph),
        kernel(number, start + 12, start + late + 150, 100, **graph)[1],  # beside the first: 50 us overlap
        *kernel(number + 1, start + 45, start + late + 260, 20),
        *kernel(number + 2, start + 60, start + late + 300, 150, **graph),
    ]


def test_on_a_gpu_kernels_count_for_the_span_of_their_launch():
    """Verify 250 us in all, 20 between, MTP 150; the next round's first kernel 500 us behind this one's."""
    events = gpu_round(10, 0, 1000) + gpu_round(20, 500, 1000)
    # On its own stream, launched by nobody in a round: busy, but of no part.
    events += kernel(99, 460, 1470, 10)
    found = breakdown(events)
    assert found == Breakdown("gpu", 1, round=0.5, verify=0.25, mtp=0.15, other=0.03, gap=0.07, host=0.1)


def test_spans_repeated_on_the_gpu_are_not_counted():
    events = [event for start in (0, 150) for event in host_round(start)]
    events += [{**event, "cat": "gpu_user_annotation", "dur": 9999} for event in events]
    assert breakdown(events).verify == 0.03


def test_a_trace_without_rounds_says_so():
    with pytest.raises(NoRounds, match="1 rounds in the trace"):
        breakdown(host_round(0))
    lost = [event for start in (0, 150) for event in host_round(start)] + [kernel(1, 12, 20, 5)[1]]
    with pytest.raises(NoRounds, match="no launches"):
        breakdown(lost)


def test_spans_of_a_real_profiler(tmp_path):
    @spanned(VERIFY)
    def work():
        return torch.ones(64, 64) @ torch.ones(64, 64)

    @spanned(ROUND)
    def one_round():
        return work()

    one_round()  # no profiler: no span
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert [one_round().sum().item() for _ in range(3)] == [64**3] * 3
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    (tmp_path / "trace.json.gz").write_bytes(gzip.compress((tmp_path / "trace.json").read_bytes()))
    found = breakdown(read(tmp_path / "trace.json.gz"))
    assert found == breakdown(read(tmp_path / "trace.json"))
    assert (found.source, found.rounds) == ("cpu", 2)
    assert 0 < found.verify < found.round and found.mtp == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_spans_of_the_worker(tmp_path, monkeypatch):
    """The real worker over toy models: a prefill, then rounds that verify and draft."""
    host = Host(make_worker(monkeypatch, 3))
    requests = [host.admit([1, 2, 3, 4, 5]), host.admit([5, 6])]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        host.prefill({request: len(request.tokens) for request in requests})
        for _ in range(4):
            host.round(requests)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = read(tmp_path / "trace.json")
    names = [event["name"] for event in sorted(events, key=lambda event: event.get("ts", 0))]
    assert [name for name in names if name.startswith("step35.")] == [
        PREFILL, MTP, *[ROUND, f"{WIDTH}4", VERIFY, MTP] * 4
    ]  # fmt: skip
    assert breakdown(events, width=4) == (found := breakdown(events))
    assert found.rounds == 3
    # Medians of their own: each part is within the host's time, their sum need not be.
    assert min(found.verify, found.mtp) > 0 and max(found.verify, found.mtp) <= found.host <= found.round
