"""Presets: SGLang's own parser takes them, and a twin differs by its speculative flags only."""

import argparse
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = sorted(CONFIGS.glob("*.yaml"))
SPECULATIVE = {
    "speculative-algorithm": "EAGLE",
    "speculative-num-steps": 3,
    "speculative-eagle-topk": 1,
    "speculative-num-draft-tokens": 4,
    "enable-multi-layer-eagle": True,
}


def fields(path):
    return yaml.safe_load(path.read_text())


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
def test_every_preset_has_a_twin_without_mtp(path):
    base = path.stem.removesuffix("-no-mtp")
    with_mtp = fields(CONFIGS / f"{base}.yaml")
    without = fields(CONFIGS / f"{base}-no-mtp.yaml")
    assert {**without, **SPECULATIVE} == with_mtp
