"""scripts/gpu_check without a GPU: arguments and refusals, server lines, offline loop, memory, report."""

import json
import subprocess
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts.gpu_check import __main__ as program
from scripts.gpu_check import accept, bench, memory, report, servers, suite, truncated
from scripts.gpu_check.echo import Echo
from scripts.gpu_check.options import Refused, Setting, check_device
from sglang_step35.bench.servers import ServerFailed
from sglang_step35.bench.stats import Cell, Run, run_to_json
from sglang_step35.config import parse_config
from sglang_step35.planner import GIB

ROOT = Path(__file__).parent.parent
H100 = {"name": "NVIDIA H100 80GB HBM3", "driver": "570.1", "memory_mib": 81559, "capability": "9.0", "count": 1}
MACHINE = {"date": "2030-01-02", "gpu": H100, "cpus": 16, "host_memory_gib": 128.0, "torch": "2", "device": "cuda"}
CHECKPOINT = {"moe_layers": 4, "bytes": 44_000_000_000, "accept_length": 2.88}


def shell(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "scripts/gpu_check.sh", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def setting(tmp_path):
    """A GPU machine whose checkpoint has been written."""
    made = Setting(tmp_path, moe_layers=4)
    made.save("machine", MACHINE)
    made.save("checkpoint", CHECKPOINT | {"config": truncated.truncated(4)})
    return made


def test_every_step_is_listed_and_reported():
    assert shell().stdout.count("\n  ") >= len(program.STEPS)
    assert all(f"\n  {name} " in shell().stdout for name in program.STEPS)
    assert shell("--names").stdout.split() == list(program.STEPS)
    assert {"machine", *program.STEPS} - {"setup", "report"} == set(report.STEPS)


def test_an_unknown_step_names_the_others(capsys):
    assert program.main(["bench"]) == 2
    assert "bench: no such step; known: setup, tests" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting, cuda, message",
    [
        (Setting(), False, r"no CUDA device here: .*--tiny --device cpu"),
        (Setting(device="cpu"), True, "add --tiny"),
        (Setting(device="cpu", tiny=True), False, None),
        (Setting(), True, None),
    ],
)
def test_a_machine_without_gpu_is_refused_unless_steps_are_tried(setting, cuda, message):
    if message is None:
        check_device(setting, cuda)
    else:
        with pytest.raises(Refused, match=message):
            check_device(setting, cuda)


def test_a_step_names_the_one_it_needs(tmp_path):
    with pytest.raises(Refused, match=r"checkpoint.json is missing: run the step checkpoint first"):
        bench.run(Setting(tmp_path, device="cpu", tiny=True), "mtp")
    with pytest.raises(Refused, match=r"machine.json is missing: run the step setup first"):
        truncated.run(Setting(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refusal of a machine without GPU")
def test_the_program_refuses_in_one_line(tmp_path, capsys):
    assert program.main(["memory", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_too_few_layers_are_refused(setting):
    with pytest.raises(Refused, match="--moe-layers 1: expected 2 to 42"):
        truncated.run(replace(setting, moe_layers=1))


def test_the_planner_chooses_the_layers(setting, monkeypatch):
    monkeypatch.setattr(truncated.shutil, "disk_usage", lambda path: Namespace(free=50 << 30))
    assert truncated.layers(setting) == 4
    asked = replace(setting, moe_layers=None)
    assert 3 <= truncated.layers(asked) <= 5  # of the disk's 50 GiB 4 stay free; a layer has 9 GB
    assert truncated.layers(Setting(tiny=True)) == 2


def test_servers_are_started_by_the_planner_s_line(setting):
    mtp, off, adaptive, stock = (servers.arguments(setting, kind) for kind in ("mtp", "off", "adaptive", "stock"))
    assert mtp[mtp.index("--model-path") + 1] == str(setting.checkpoint)
    assert "--enable-multi-layer-eagle" in mtp and "--enable-multi-layer-eagle" not in off
    assert adaptive == (*mtp, "--speculative-adaptive")
    assert stock == mtp
    flashinfer = servers.arguments(setting, "flashinfer")
    assert flashinfer == (*mtp, "--attention-backend", "flashinfer") and "--attention-backend" not in mtp
    assert mtp[mtp.index("--context-length") + 1] == str(setting.context)
    assert servers.plan_for(setting, "mtp").best.concurrency(setting.context) >= 32
    setting.save("checkpoint", {"config": truncated.truncated(2, tiny=True)})
    tiny = servers.arguments(replace(setting, tiny=True), "mtp")  # a GPU too small for the published widths
    assert tiny[tiny.index("--context-length") + 1] == "1296" and "--device" not in tiny
    cpu = servers.arguments(replace(setting, device="cpu", tiny=True), "off")
    assert cpu[cpu.index("--device") + 1] == "cpu" and "--speculative-algorithm" not in cpu


def test_why_a_server_did_not_start():
    log = "server exited with 1; its log ends:\n  File x\nKeyError: 'full_attention'\nRuntimeError: rank 0 died\nbye"
    assert servers.reason(ServerFailed(log)) == "RuntimeError: rank 0 died"
    assert servers.reason(ServerFailed("server not healthy after 300 s; its log ends:\nx")).startswith("server not")


def test_requests_say_different_things():
    work = bench.sessions(list(range(10, 2000)), 64, 32, "a")
    assert {len(session.prompt) for session in work} == {64}
    assert len({session.prompt[-1] for session in work}) > 25
    assert work == bench.sessions(list(range(10, 2000)), 64, 32, "a") != bench.sessions([1, 2], 64, 32, "a")


# Tokens 1 -> 2 -> 3 -> 4 -> 1; layer 0 is wrong after 2, layer 1 after 4, layer 2 never.
TOY = Echo(
    successor=torch.tensor([1, 2, 3, 4, 1, 5]),
    hits=torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool(),
    spoken=torch.tensor([1, 2, 3, 4]),
)


def test_the_offline_loop_by_hand():
    """Behind 4: token 1 from the prefill; 1 drafts all three, 2, 3, 4, and the target adds 1; and so on."""
    assert TOY.text(4, 9) == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert TOY.rounds(TOY.text(4, 12), 9) == {3: 2}
    # Behind 1: 2 drafts wrongly (0, adds 3); 3 drafts 4, whose layer 1 is wrong (1, adds 1); 1 drafts all.
    assert TOY.rounds(TOY.text(1, 12), 8) == {0: 1, 1: 1, 3: 1}
    assert TOY.text(5, 2) == [5, 5]


def answer(ids, histogram) -> dict:
    return {"output_ids": ids, "meta_info": {"spec_correct_drafts_histogram": histogram}}


def test_a_wrong_id_and_another_draft_are_counted():
    right = answer([2, 3, 4, 1, 2, 3, 4, 1], [1, 1, 0, 1])
    found = accept.compare_echo(TOY, [[1], [1]], [right, answer([2, 3, 4, 1, 2, 3, 4, 2], [1, 1, 1, 0])])
    assert (found.wrong_ids, found.requests_with_other_drafts) == (1, 1)
    assert (found.accepted, found.accepted_offline) == ([2, 2, 1, 1], [2, 2, 0, 2])
    assert accept.accept_length([2, 2, 0, 2]) == pytest.approx(1 + 8 / 6, abs=1e-3)


LOG = """
Load weight end. elapsed=40.00 s, type=Step3p5ForCausalLM, avail mem=37.10 GB, mem usage=38.60 GB.
Load weight end. elapsed=2.00 s, type=Step3p5MTP, avail mem=35.40 GB, mem usage=1.70 GB.
SWAKVPool mem usage: 10.00 GB, swa size: 20000, full size: 1000000
SWAKVPool mem usage: 0.23 GB, swa size: 20000, full size: 0
"""


def test_memory_is_compared_with_the_planner(setting):
    fields = setting.need("checkpoint")["config"]
    planned = servers.plan_for(setting, "mtp").best.pools
    graphs = {"prefill": 0.0, "decode": 0.5, "draft_extend": 0.25}
    usage = {"token_capacity": 1_000_000, "token_capacity_swa": 20_000, "graph": graphs}
    found = {figure.name: figure for figure in memory.figures(usage, LOG, fields, planned)}
    # 4 layers of 288 x 3 + 3 matrices of 4096 x 1280, two vocabulary tables, dense layers and attention.
    assert found["weights, backbone"].planned == pytest.approx((4 * 9.09 + 2.11 + 1.9) * 1e9 / GIB, rel=0.02)
    assert found["weights, backbone"].taken == 38.6
    # Full layers 0 and 4, five sliding ones, three MTP layers; 4 KiB a token and layer.
    assert found["KV, backbone"].planned == pytest.approx((1_000_001 * 2 + 20_001 * 5) * 4096 / GIB)
    assert found["KV, MTP layers"].planned == pytest.approx(20_001 * 3 * 4096 / GIB)
    assert found["KV, MTP layers"].ratio is None  # too small for the log's digits
    assert found["full slots"].planned == planned.full_tokens
    assert (found["graphs, decode"].taken, found["graphs, draft_extend"].taken) == (0.5, 0.25)
    silent = memory.figures(usage, "", fields, None)
    assert [figure.taken for figure in silent[:4]] == [None] * 4
    assert "-" in silent[0].line


def run_of(kind: str, speed: float) -> dict:
    cells = tuple(
        Cell(prompt, clients, 8, {}, 2.0, 100, True, speed * clients, None, None, None, None if kind == "off" else 2.9,
             None, None, 0)
        for prompt in ("1K", "16K") for clients in (1, 8)
    )  # fmt: skip
    return {"kind": kind, "run": run_to_json(Run(kind, "m", "sglang", "now", {}, cells))}


ROUND = {"source": "gpu", "rounds": 9, "round": 4.0, "verify": 2.5, "mtp": 1.0, "other": 0.1, "gap": 0.4, "host": 1.5}
PART = {"accept_length": 2.87, "offline": 2.88}
RESULTS = {
    "machine": MACHINE,
    "checkpoint": CHECKPOINT,
    "tests": {"exit": 0, "passed": 9, "failed": 0, "skipped": 0},
    "bench-off": run_of("off", 100.0),
    "bench-mtp": run_of("mtp", 180.0),
    "bench-stock": {"kind": "stock", "no_start": "KeyError: 'x'"},
    "accept": {"truncated": PART, "nano": PART, "right": True},
    "profile": {"rounds": [{"concurrency": 1, **ROUND}, {"concurrency": 8, **ROUND}]},
    "profile-adaptive": {"rounds": [{"concurrency": 8, "width": 2, **ROUND}], "captured": {"1": 0.2, "2": 0.3}},
    "memory": {"figures": [{"name": "graphs", "taken": None, "planned": None, "unit": "GiB"}], "far": []},
}


def test_report_names_what_did_not_run():
    text = report.text(RESULTS)
    absent = "tests-flashinfer, tests-fa3, tests-triton, tests-server, bench-adaptive, bench-flashinfer"
    assert text.endswith(f"not run: {absent}")
    assert "2030-01-02: NVIDIA H100 80GB HBM3, 81559 MiB, driver 570.1" in text
    assert "bench-stock: does not start: KeyError: 'x'" in text
    assert "  8 requests, 9 rounds (gpu): round 4.000 ms  verify 2.500" in text
    assert "  8 requests, 2 tokens verified, 9 rounds (gpu): round 4.000 ms" in text
    assert "verify graphs, GB: 1 tokens 0.2, 2 tokens 0.3" in text
    assert " 1.80 " in text  # ratio of mtp to off
    assert report.text({}).strip() == f"not run: {', '.join(report.STEPS)}"


def test_report_has_one_line_of_json_and_a_picture(tmp_path, capsys):
    setting = Setting(tmp_path)
    for name, found in RESULTS.items():
        setting.save(name, found)
    report.run(setting)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(line["results"]) == 8 and line["results"][4]["tokens_per_second"] == 180.0
    assert line["machine"]["gpu"]["driver"] == "570.1" and line["no_start"] == {"bench-stock": "KeyError: 'x'"}
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert report.picture({}) is None
    assert report.picture({"bench-off": run_of("off", 1.0)})[:4] == b"\x89PNG"


def test_outcomes_of_a_junit_report():
    xml = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>
    <testcase name="c"><failure>x</failure></testcase><testcase name="d"><error/></testcase></testsuite></testsuites>"""
    assert suite.outcomes(xml) == {"passed": 1, "failed": 2, "skipped": 1}


@pytest.mark.parametrize(
    "found, wrong",
    [
        ({"exit": 0, "failed": 0}, False),
        ({"exit": 1, "failed": 2}, True),
        ({"right": False}, True),
        ({"kind": "stock", "no_start": "x"}, False),
        ({"kind": "mtp", "no_start": "x"}, True),
        (MACHINE, False),
        (report.summary(RESULTS), False),
    ],
)
def test_what_counts_as_a_failed_step(found, wrong):
    assert program.failed(found) is wrong


def test_spec_of_the_truncated_checkpoint_is_valid(setting):
    assert parse_config(setting.need("checkpoint")["config"]).num_layers == 7
