"""Heads in fewer bits for drafts: their logits against the reference's, and when there are copies."""

import gc
from types import SimpleNamespace

import pytest
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.torch import load_file

from sglang_step35.model import draft_heads
from sglang_step35.model.graphed_mtp import GraphedPass
from sglang_step35.model.mtp_pass import LayerPass
from sglang_step35.packed import ik_check, int8_rows, prepare
from sglang_step35.speculative.device import rounds_heads
from tests.model.test_graphed_mtp import Server, of_directory, rounds
from tests.packed.test_model import SMALL, converted
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.paged_host import prompts
from tests.support.reference import load_reference

HALF_A_PERCENT = 0.005  # of weights and of activations, each
A_THIRD = 0.35  # of products by 2 bits
pytestmark = pytest.mark.skipif(not ik_check.usable(), reason="the library is not usable here")


@pytest.fixture(autouse=True)
def small_heads_count(monkeypatch):
    """Of 512 tokens 128 come out anew from behind a screen."""
    monkeypatch.setattr(draft_heads, "LARGE", 1)
    monkeypatch.setattr(draft_heads, "WORTH", 1)
    monkeypatch.setattr(draft_heads, "GROUPS", 16)


@pytest.fixture
def eight_bits(monkeypatch):
    """For any number of requests."""
    monkeypatch.setattr(draft_heads, "FEW", 0)


screens = pytest.mark.skipif(not int8_rows.supported(), reason="the CPU does not multiply int8")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("heads"), CheckpointShape(residual=0.1))


def bfloat16(directory, by_graphs=True) -> Server:
    return of_directory(directory, load_reference(directory), torch.bfloat16, by_graphs)


def shared_heads(directory, by_graphs=True) -> Server:
    server = bfloat16(directory, by_graphs)
    for depth in range(3):
        server.model.tables._used[depth, "head"] = server.model.tables.backbone["head"]
    return server


@pytest.mark.parametrize("by_graphs", [True, False])
def test_logits_are_the_reference_s_within_what_8_bits_cost(eight_bits, directory, by_graphs):
    server = bfloat16(directory, by_graphs)
    passes = rounds(prompts(28, 14, 5))
    exact = [(server.run(spans), server.error(spans)) for spans in passes]
    assert server.model.tables.round_heads() == 3
    for spans, (logits, error) in zip(passes, exact, strict=True):
        assert server.error(spans) < error + 2 * HALF_A_PERCENT
        assert not any(map(torch.equal, server.run(spans), logits))
    assert set(server.ways) == {GraphedPass if by_graphs else LayerPass}


@pytest.mark.parametrize("alone", [True, False])
def test_what_sglang_multiplies_by_itself(eight_bits, directory, alone):
    reference, (ids,) = load_reference(directory), prompts(20)
    backbone, mtp = (model_host.load(directory, draft=draft, dtype="bfloat16") for draft in (False, True))
    mtp.share_with(backbone)
    for layer in mtp.layers:
        layer.runs_single_rank = alone
    hidden = reference.hidden_before_norm(ids).bfloat16()
    before = model_host.mtp_logits(mtp, hidden, ids)
    mtp.tables.round_heads()
    for found, exact in zip(model_host.mtp_logits(mtp, hidden, ids), before, strict=True):
        assert 0 < float((found - exact).float().norm() / exact.float().norm()) < 3 * HALF_A_PERCENT


@screens
@pytest.mark.parametrize("by_graphs", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_the_largest_logits_behind_a_screen_are_the_head_s_own(directory, by_graphs, alone):
    """By graphs, by our kernels one by one, and by SGLang's way to a head; the others are as far off as 2 bits are."""
    server, spans = bfloat16(directory, by_graphs), [(0, prompts(12)[0], 0, 8)]
    for layer in server.model.layers:
        layer.runs_single_rank = alone
    exact = server.run(spans)
    server.model.tables.round_heads()
    for found, logits in zip(server.run(spans), exact, strict=True):
        assert torch.equal(found.argmax(-1), logits.argmax(-1))
        assert torch.isclose(found, logits, atol=0.03, rtol=0.01).sum() >= 8 * draft_heads.GROUPS
        assert HALF_A_PERCENT < (found - logits).norm() / logits.norm() < A_THIRD


@screens
def test_a_head_in_float16_behind_a_screen(directory):
    server = of_directory(directory, load_reference(directory), torch.float16, False)
    spans = [(0, prompts(12)[0], 0, 8)]
    exact = server.run(spans)
    server.model.tables.round_heads()
    for found, logits in zip(server.run(spans), exact, strict=True):
        assert torch.isclose(found, logits, atol=0.03, rtol=0.01).sum() >= 8 * draft_heads.GROUPS
        assert torch.equal(found.argmax(-1), logits.argmax(-1)) and not torch.equal(found, logits)


@screens
def test_more_requests_read_8_bits(directory):
    tables = bfloat16(directory).model.tables
    tables.round_heads()
    few, many = (tables.draft_head(0, rows).qweight.rows()[0] for rows in (draft_heads.FEW, draft_heads.FEW + 1))
    assert few.nbytes * 3 < many.nbytes < 512 * 64 * 1.1


@screens
@pytest.mark.parametrize("by_graphs", [True, False])
def test_new_weights_behind_a_screen(directory, by_graphs):
    server = shared_heads(directory, by_graphs)
    tables, spans = server.model.tables, [(0, prompts(12)[0], 0, 8)]
    tables.round_heads()
    place = tables.draft_head(0).qweight.rows()[0].data.data_ptr()
    server.run(spans)
    server.backbone.load_weights([("lm_head.weight", -server.backbone.lm_head.weight.float())])
    behind = server.run(spans)
    assert tables.draft_head(0).qweight.rows()[0].data.data_ptr() == place
    tables._rounded = None
    for found, logits in zip(behind, server.run(spans), strict=True):
        assert torch.equal(found.argmax(-1), logits.argmax(-1))
        assert (found - logits).norm() / logits.norm() < A_THIRD


@screens
def test_a_packed_head_behind_a_screen(tmp_path):
    """Its interleaved rows give the largest logits."""
    file, reference = converted(tmp_path, SMALL, lambda name: Q.Q4_0)
    server = Server(*(model_host.load_gguf(file, draft=d, dtype="bfloat16") for d in (False, True)), reference)
    spans = [(0, prompts(12)[0], 0, 8)]
    exact = server.run(spans)
    assert server.model.tables.round_heads() > 0
    for found, logits in zip(server.run(spans), exact, strict=True):
        assert torch.isclose(found, logits, rtol=1e-5).sum() >= 8 * draft_heads.GROUPS
        assert torch.equal(found.argmax(-1), logits.argmax(-1)) and not torch.equal(found, logits)


def test_layers_that_share_a_head_share_its_copy(directory):
    tables = shared_heads(directory).model.tables
    assert tables.round_heads() == 1
    assert tables.draft_head(0) is tables.draft_head(2) is not tables.head(0)


def test_float32_activations_meet_the_head_itself(directory):
    """Those of `--enable-fp32-lm-head`."""
    tables, hidden = shared_heads(directory).model.tables, torch.randn(3, 64)
    tables.round_heads()
    copy, head = tables.draft_head(0), tables.head(0)
    assert torch.allclose(copy.quant_method.apply(copy, hidden), hidden @ head.weight.float().T, atol=1e-5)


def test_verification_reads_the_head_itself(directory):
    server = bfloat16(directory)
    before = model_host.all_logits(server.backbone, prompts(9)[0])
    server.model.tables.round_heads()
    assert torch.equal(model_host.all_logits(server.backbone, prompts(9)[0]), before)


@pytest.mark.parametrize("by_graphs", [True, False])
def test_new_weights_of_a_head(eight_bits, directory, by_graphs):
    """A copy stays where it is, since graphs hold it."""
    server = shared_heads(directory, by_graphs)
    tables, spans = server.model.tables, [(0, prompts(12)[0], 0, 8)]
    tables.round_heads()
    before, place = server.run(spans), tables.draft_head(0).qweight.rows()[0].data.data_ptr()
    server.backbone.load_weights([("lm_head.weight", -server.backbone.lm_head.weight.float())])
    assert all(torch.equal(after, -logits) for after, logits in zip(server.run(spans), before, strict=True))
    assert tables.draft_head(0).qweight.rows()[0].data.data_ptr() == place


def test_new_heads_of_the_layers_leave_no_copies_behind(eight_bits, directory):
    server = bfloat16(directory)
    server.model.tables.round_heads()
    name = "model.layers.9.transformer.shared_head.output.weight"
    spans = [(0, prompts(12)[0], 0, 8)]
    before = server.run(spans)
    for sign in (1, -1, 1, -1):
        server.model.load_weights([(name, sign * load_file(directory / "model.safetensors")[name])])
        after = server.run(spans)
    assert torch.equal(after[0], -before[0]) and torch.equal(after[1], before[1])
    gc.collect()  # a table and its loader hold each other
    assert len(server.model.tables._rounded._copies) == 3


def test_what_stays(eight_bits, directory, tmp_path, monkeypatch):
    """Small heads, those of 8 bits for more requests than two, and any where memory is short."""
    tables = bfloat16(directory).model.tables
    file, reference = converted(tmp_path, SMALL, lambda name: Q.Q8_0)
    packed = Server(*(model_host.load_gguf(file, draft=d, dtype="bfloat16") for d in (False, True)), reference)
    assert packed.model.tables.round_heads() == 0
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_memory_allows", lambda size: False)
        assert tables.round_heads() == 0
    with monkeypatch.context() as patch:
        patch.setattr(draft_heads, "LARGE", 512 * 64 + 1)
        assert tables.round_heads() == 0
    assert tables.draft_head(1) is tables.head(1)


def test_heads_of_16_bits_in_a_packed_file(tmp_path):
    file, reference = converted(tmp_path, SMALL, lambda name: Q.F16 if "output.weight" in name else Q.Q8_0)
    server = Server(*(model_host.load_gguf(file, draft=d, dtype="bfloat16") for d in (False, True)), reference)
    assert server.model.tables.round_heads() > 0


@pytest.mark.parametrize(
    ("device", "dtype", "given", "method", "rounds"),
    [
        ("cpu", torch.bfloat16, False, None, True),
        ("cpu", torch.float16, False, "fp8", True),
        ("cpu", torch.bfloat16, True, "fp8", True),
        ("cpu", torch.bfloat16, True, None, False),
        ("cpu", torch.float32, False, None, False),
        ("cuda", torch.bfloat16, False, None, False),
    ],
)
def test_when(device, dtype, given, method, rounds):
    """given: whether the draft's quantisation was, as SGLang notes it."""
    spec = SimpleNamespace(
        _speculative_draft_quantization_explicitly_set=given, speculative_draft_model_quantization=method
    )
    assert rounds_heads(SimpleNamespace(device=device, dtype=dtype), spec) is rounds
