"""Presets: SGLang takes them, resolves them to the intended backend, worker and depth, and twins differ by MTP only."""

import argparse
import json
import os
import subprocess
import sys
from functools import cache

import pytest
import yaml

from sglang_step35.assets import CONFIGS
from tests.support import preset_host

# prometheus.yml and the like are not for `sglang serve`.
PRESETS = sorted(CONFIGS.glob("*.yaml"))
SPECULATIVE = {
    "speculative-algorithm": "EAGLE",
    "speculative-num-steps": 3,
    "speculative-eagle-topk": 1,
    "speculative-num-draft-tokens": 4,
    "enable-multi-layer-eagle": True,
}
ATTENTION = {
    "bf16-8gpu": "fa3",
    "fp8-8gpu": "fa3",
    "fp8-4xh200": "fa3",
    "int4-dgx-spark": "flashinfer",
    "nano-cpu": "step35_portable",
    "gguf-cpu": "step35_portable",
    "int4-cpu": "step35_portable",
}
WORKER = "sglang_step35.speculative.worker.Step35SpecWorker"
# Keys that say by themselves what they do, or do in every preset.
OBVIOUS = {
    "model-path", "served-model-name", "tp-size", "tool-call-parser", "reasoning-parser", "host", "port",
    "speculative-algorithm", "speculative-num-steps", "enable-multi-layer-eagle",
}  # fmt: skip


def fields(path):
    return yaml.safe_load(path.read_text())


def base(path) -> str:
    return path.stem.removesuffix("-no-mtp")


def on_cpu(path) -> bool:
    return base(path).endswith("-cpu")


@cache
def resolved(cpu: bool) -> dict[str, dict]:
    """What SGLang makes of all presets of one platform, in a process of its own (about 15 s)."""
    names = [path.stem for path in PRESETS if on_cpu(path) == cpu]
    env = {**os.environ, **({"SGLANG_PLATFORM": "step35"} if cpu else {})}
    done = subprocess.run(
        [sys.executable, preset_host.__file__, *names], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_machine_has_its_preset():
    assert {base(path) for path in PRESETS} == set(ATTENTION) == set(preset_host.MACHINES)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_sglang_parses_the_preset(path):
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flags = []
    for key, value in fields(path).items():
        flags += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    if "model-path" not in fields(path):
        flags += ["--model-path", "nano"]
    parsed = vars(parser.parse_args(flags))
    for key, value in fields(path).items():
        assert parsed[key.replace("-", "_")] == value


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_resolves_to_the_intended_backend_worker_and_depth(path):
    found = resolved(on_cpu(path))[path.stem]
    assert found["attention_backend"] == ATTENTION[base(path)]
    assert {found["prefill_attention_backend"], found["decode_attention_backend"]} <= {None, ATTENTION[base(path)]}
    if path.stem == base(path):
        assert found["worker"] == WORKER
        assert (found["speculative_num_steps"], found["speculative_num_draft_tokens"]) == (3, 4)
        assert found["enable_multi_layer_eagle"]
    else:
        assert found["worker"] is None and found["speculative_num_steps"] is None
    assert found["device"] == ("cpu" if on_cpu(path) else "cuda")
    assert found["sleep_on_idle"] == found["disable_overlap_schedule"] == on_cpu(path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_no_value_of_the_preset_is_overridden(path):
    own = resolved(on_cpu(path))[path.stem]["own"]
    assert own == {key.replace("-", "_"): value for key, value in fields(path).items() if key != "model-path"}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_has_a_twin_without_mtp(path):
    with_mtp = fields(CONFIGS / f"{base(path)}.yaml")
    without = fields(CONFIGS / f"{base(path)}-no-mtp.yaml")
    assert {**without, **SPECULATIVE} == with_mtp


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_lines_that_are_not_obvious_say_why(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if "  # " not in line and line.split(":")[0] not in OBVIOUS] == []


@pytest.mark.parametrize("quantization", ["gguf", "int4"])
def test_memory_of_the_cpu_presets_is_the_planners(quantization):
    """One request of half the model's context on the smaller of the 128 GB machines."""
    from sglang_step35.cli.plan import load
    from sglang_step35.planner.command import serve_arguments
    from sglang_step35.planner.hardware import machine
    from sglang_step35.planner.plan import Wish, make_plan

    wish = Wish(quantization=quantization, context=131_072, concurrency=1)
    planned = serve_arguments(make_plan(load(None)[0], machine("ai-max-395"), wish))
    preset = fields(CONFIGS / f"{quantization}-cpu.yaml")
    for flag in ("context-length", "max-running-requests", "mem-fraction-static", "max-total-tokens",
                 "swa-full-tokens-ratio", "model-path", "device"):  # fmt: skip
        assert planned[planned.index(f"--{flag}") + 1] == str(preset[flag])
