"""What is written for ggml's kernels means the same weights as another library reads in the checkpoint."""

from types import SimpleNamespace

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from sglang_step35.packed import ik_check, kernel, prepare
from sglang_step35.packed.ggml import GGMLTensor, plain
from sglang_step35.packed.grouped import CODES, GroupedTensor
from sglang_step35.packed.parameter import PackedParameter
from sglang_step35.packed.prepare import can_round, prepared, rounded
from sglang_step35.packed.stack import StackedTensor
from tests.packed.test_ik_kernel import BF16, ROUNDED, chosen_experts, error
from tests.packed.test_kinds import SCHEMES, collected
from tests.packed.test_unpack import packed
from tests.support import quantised

pytestmark = pytest.mark.skipif(not ik_check.usable(), reason="the library is not usable here")
WRITTEN = {"MXFP4": 0, "Q4_0": 0, "Q8_0": 0, "Q4_1": 3e-4}  # bfloat16 scales fit float16
# What no GGML type of about the size holds; GPTQ's zero points are drawn, so that its 8 bits are asymmetric.
KEPT = ("GPTQ, 8 bits", "W8A16, asymmetric")
NOT_WRITTEN = (*KEPT, "FP8", "FP8, experts one by one")  # `test_float8.py`
WRITTEN_SCHEMES = {name: scheme for name, scheme in SCHEMES.items() if name not in NOT_WRITTEN}
WIDE_GROUPS = {name: scheme for name, scheme in quantised.schemes(128).items() if name not in NOT_WRITTEN}
ALL = {**WRITTEN_SCHEMES, **{f"{name}, groups of 128": scheme for name, scheme in WIDE_GROUPS.items()}}


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Of a host with enough of it."""
    torch.manual_seed(0)
    memory = SimpleNamespace(available=99 << 20, total=100 << 20)
    monkeypatch.setattr(prepare.psutil, "virtual_memory", lambda: memory)
    return memory


@pytest.fixture
def in_place(monkeypatch):
    """No interleaving, so that the written blocks can be read back."""
    monkeypatch.setattr(prepare, "INTERLEAVED", {})


@pytest.mark.parametrize("name", ALL)
def test_weights_are_the_checkpoint_s(name, in_place):
    matrix, meaning = collected(ALL[name], 96, 256)
    written = prepared(matrix)
    assert isinstance(written, GGMLTensor) and written.shape == (96, 256)
    assert error(written.dequantize(), meaning) <= WRITTEN[written.type.name]
    assert written.nbytes < 1.25 * matrix.nbytes


@pytest.mark.parametrize("name", ALL)
def test_products(name):
    matrix, meaning = collected(ALL[name], 96, 256)
    for rows in (1, 4, 40):
        x = torch.randn(rows, 256).bfloat16()
        assert error(kernel.linear(x, [prepared(matrix)]), x.float() @ meaning.T) < ROUNDED + BF16


@pytest.mark.parametrize("name", prepare.INTERLEAVED)
def test_interleaved_rows(name):
    tensor, expected = packed(name, 48, 512)
    before = tensor.data.clone()
    written = prepared(tensor)
    assert written.type is prepare.INTERLEAVED[name][0] and written.nbytes == tensor.nbytes
    assert torch.equal(tensor.data, before)
    for rows in (1, 4, 40):
        x = torch.randn(rows, 512).bfloat16()
        assert error(kernel.linear(x, [written]), x.float() @ expected.T) < ROUNDED + BF16
    with pytest.raises(TypeError, match="only ggml's kernels read them"):
        written.dequantize()
    assert prepared(written) is written


@pytest.mark.parametrize("name", WRITTEN_SCHEMES)
def test_experts(name):
    """Kept one by one, and a rank's half of their width."""
    stacks, meanings = [], []
    for rows, columns in ((64, 128), (64, 128), (128, 64)):
        matrices = [collected(SCHEMES[name], rows, columns) for _ in range(4)]
        stacks.append(StackedTensor({e: matrix for e, (matrix, _) in enumerate(matrices)}))
        meanings.append(torch.stack([meaning for _, meaning in matrices]))
    shares = stacks[0].rows(0, 32), stacks[1].rows(0, 32), stacks[2].columns(0, 32)
    gate, up, down = (prepared(part) for part in shares)
    assert gate.data.shape[0] == 4
    meanings = meanings[0][:, :32], meanings[1][:, :32], meanings[2][..., :32]
    weights, ids = torch.rand(6, 2), torch.rand(6, 4).topk(2).indices
    ids[2, 0] = -1
    x = torch.randn(6, 128).bfloat16() / 8
    found = kernel.experts(x, gate, up, down, weights, ids, 0.7)
    assert error(found, chosen_experts(x.float(), *meanings, weights, ids, 0.7)) < 3 * ROUNDED


def test_a_mixed_stack_stays():
    one, two = (collected(SCHEMES[name], 32, 64)[0] for name in ("AutoRound", "W8A8"))
    stack = StackedTensor({0: one, 1: two})
    assert prepared(stack) is stack


def test_what_the_kernels_read_in_place_stays():
    for name in ("BF16", "F16", "F32"):
        tensor, _ = packed(name, 48, 64)
        assert prepared(tensor) is tensor
    odd, _ = packed("Q8_0", 43, 64)  # rows that do not divide by eight
    assert prepared(odd) is odd


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_rounding_to_8_bits_is_another_library_s(name):
    tensor, meaning = packed(name, 43, 64)  # rows that do not divide by eight stay in order
    expected = quantize(meaning.numpy(), GGMLQuantizationType.Q8_0)
    assert can_round(tensor) and torch.equal(rounded(tensor).data, torch.from_numpy(expected))


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_products_by_rounded_weights(rows):
    tensor, meaning = packed("BF16", 48, 512)
    copy, x = rounded(tensor), torch.randn(rows, 512).bfloat16()
    assert copy.type.name == "Q8_0_R8" and copy.nbytes == tensor.nbytes * 34 // 64
    assert error(kernel.linear(x, [copy]), x.float() @ meaning.T) < 2 * ROUNDED + BF16


def test_what_is_not_rounded(memory):
    assert not can_round(packed("Q8_0", 48, 64)[0])
    assert not can_round(plain(torch.zeros(8, 48)))  # columns that are no whole blocks
    tensor, _ = packed("BF16", 48, 64)
    memory.available = memory.total // 4 + 48 * 64
    assert not can_round(tensor)


def test_memory_that_would_not_last(memory):
    tensor, _ = packed("Q8_0", 48, 64)
    memory.available = memory.total // 4 + tensor.nbytes
    assert prepared(tensor) is tensor
    memory.available += 1
    assert prepared(tensor) is not tensor


@pytest.mark.parametrize("name", KEPT)
def test_what_would_take_twice_its_memory_stays(name):
    matrix, _ = collected(SCHEMES[name], 96, 256)
    assert prepared(matrix) is matrix


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(prepare, "usable", lambda: False)
    matrix, _ = collected(SCHEMES["AWQ"], 32, 64)
    assert prepared(matrix) is matrix


@pytest.mark.parametrize(
    "matrix",
    [
        GroupedTensor(CODES["INT4"], torch.zeros(8, 32, dtype=torch.uint8), torch.full((8, 2), 1e-7)),
        GroupedTensor(CODES["INT4"], torch.zeros(8, 32, dtype=torch.uint8), torch.full((8, 2), 1e6)),
        GroupedTensor(CODES["INT8"], torch.zeros(8, 72, dtype=torch.uint8), torch.ones(8, 1)),  # 72 columns
    ],
)
def test_what_float16_scales_or_blocks_cannot_hold_stays(matrix):
    assert prepared(matrix) is matrix
    x = torch.randn(2, matrix.shape[1]).bfloat16()
    assert torch.equal(kernel.linear(x, [matrix]), (x.float() @ matrix.dequantize().T).bfloat16())


def test_parameters_prepare_where_they_may():
    tensor, _ = packed("Q8_0", 16, 64)
    for prepares in (True, False):
        parameter = PackedParameter.of(None, cut=lambda _, whole: whole, prepares=prepares)
        parameter.fill(None, tensor)
        parameter.prepare()
        assert (parameter.rows()[0] is tensor) is not prepares


def test_an_update_of_some_experts():
    parameter = PackedParameter.of("w2", cut=lambda _, whole: whole, experts=range(2), prepares=True)
    for expert in (0, 1):
        parameter.fill("w2", torch.randn(16, 64), expert)
    parameter.prepare()
    assert parameter.rows()[0].data.shape[0] == 2
    parameter.fill("w2", torch.randn(16, 64), 1)
    with pytest.raises(ValueError, match="must bring all of a layer's"):
        parameter.prepare()
