"""Bytes of a round against the files' own sizes, and what it costs against measured rounds."""

import json
from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType as Q

from scripts.benchmarks.real_width import traffic
from sglang_step35.packed import int8_rows
from sglang_step35.speculative.round_cost import CPU, CPU_OF_INT8, GPU, Pace, RoundCost, Weights, pace_of
from tests.packed.test_model import SMALL, converted
from tests.support import model_host


@pytest.fixture(scope="module", params=["Q8_0", "Q4_0"])
def files(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    return converted(folder, SMALL, lambda name: Q[request.param])[0]


def test_bytes_are_those_of_the_file(files):
    backbone, mtp = (model_host.load_gguf(files, draft=draft) for draft in (False, True))
    mtp.share_with(backbone)
    cost = replace(RoundCost.of(backbone, mtp, num_steps=3), pace=Pace(0, 0))
    fields = json.loads((files.parent / "config.json").read_text())
    read = traffic.read(files, fields)
    layers = [read.dense[read.layers + i] - read.head for i in range(3)]  # in the file each has its own head
    for batch in (1, 16):
        for depth, found in enumerate(cost.by_depth(batch)):
            drafts = sum(layers) + depth * read.head if depth else 0
            # Head gates and norms are unpacked while they load.
            assert found == pytest.approx(read.step(batch * (depth + 1)) + drafts, rel=0.06)
        assert cost.upkeep(batch, 4) == pytest.approx(sum(layers) / 4, rel=0.06)


def test_tokens_share_experts():
    """Against tokens that really choose: 3 of 8 each."""
    nothing = Weights()
    cost = RoundCost(nothing, Weights(1, 1), 3 / 8, (), nothing, layers=1, pace=Pace(0, 0))
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 5):
        chosen = torch.rand(4000, tokens, 8, generator=generator).topk(3).indices
        touched = torch.zeros(4000, 8).scatter_(1, chosen.flatten(1), 1.0).mean()
        assert cost.touched(tokens) == pytest.approx(float(touched), rel=0.02)


@pytest.mark.parametrize(
    ("pace", "rounds"),
    [
        (CPU, {(1, 0): 11.5, (1, 3): 30.6, (16, 0): 64.5, (16, 3): 260}),
        (CPU_OF_INT8, {(1, 0): 10.6, (1, 3): 26.6, (4, 0): 16.6, (4, 3): 54.5, (16, 0): 40, (16, 3): 170}),
    ],
)
def test_measured_rounds_of_the_checkpoint_of_real_widths(pace, rounds):
    """0.9B parameters in Q4_0 at 34 GB/s (docs/real-widths.md): milliseconds, off and MTP, by clients and depth."""
    bits = 4.5

    def of(millions: float) -> Weights:
        return Weights(millions * 1e6, millions * 1e6 * bits / 8)

    cost = RoundCost(of(134.1), of(692.1), 8 / 64, (of(17.6),) * 3, head=of(33.6), layers=12, pace=pace)
    for (batch, depth), milliseconds in rounds.items():
        assert cost.by_depth(batch)[depth] / 34e9 == pytest.approx(milliseconds / 1e3, rel=0.15)


def test_whose_kernels_multiply(monkeypatch):
    for supported, expected in ((True, CPU_OF_INT8), (False, CPU)):
        monkeypatch.setattr(int8_rows, "supported", lambda: supported)  # noqa: B023
        assert pace_of("cpu") is expected and pace_of("cuda") is GPU
