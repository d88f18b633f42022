"""`sglang serve` on nano in compressed-tensors' 4 bits, groups of 32, with the usual speculative flags."""

import json
import shutil

import pytest

from sglang_step35.assets import NANO
from sglang_step35.bench.servers import MTP_ARGS
from tests.support import quantised
from tests.support.nano_model import generate_all, histogram, prompts
from tests.support.reference import Reference

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(nano in 4 bits, MTP layers too, float32 reference on the dequantised weights)."""
    directory = tmp_path_factory.mktemp("int4") / "nano"
    shutil.copytree(NANO, directory)
    weights = quantised.write(directory, quantised.compressed(4, 32))
    return directory, Reference(json.loads((directory / "config.json").read_text()), weights)


def test_greedy_output_and_accepted_drafts_are_the_references(serve, checkpoint):
    """Nothing but config.json says that the files are quantised. Prompts shorter and longer than the window of 64."""
    directory, reference = checkpoint
    server = serve(
        "--model-path", str(directory), "--device", "cpu", "--dtype", "float32", "--reasoning-parser", "step3p5",
        "--tool-call-parser", "step3p5", "--max-total-tokens", "16384", *MTP_ARGS,
    )  # fmt: skip
    requests = [*prompts()[:6], [300], [77] * 90]
    answers = generate_all(server, requests, 32, at_once=4)
    for ids, answer in zip(requests, answers, strict=True):
        tokens, accepted = reference.speculative_greedy(ids, 32, 3)
        assert answer["output_ids"] == tokens[:32] == reference.greedy(ids, 32)
        assert histogram(answer) == [accepted.count(i) for i in range(4)]
