"""Slices of every kind of packed matrix against the same slices of what another library dequantises."""

import pytest
import torch

from sglang_step35.checkpoint.parts import PartCollector
from sglang_step35.checkpoint.quantization import Quantization
from sglang_step35.packed import kernel
from sglang_step35.packed.blocks import BlockTensor
from sglang_step35.packed.ggml import plain
from sglang_step35.packed.grouped import CODES, GroupedTensor
from sglang_step35.packed.stack import StackedTensor
from tests.packed.test_unpack import packed
from tests.support import quantised

SCHEMES = {**quantised.schemes(32), **quantised.other_schemes()}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def collected(scheme: quantised.Scheme, *shape: int):
    """A random matrix [N, K] as the package reads it from its parts, and as the other library does."""
    tensors, meaning = scheme.pack(torch.randn(*shape))
    collector = PartCollector(Quantization.of(scheme.config))
    joint = "_" if scheme.joint == "_" else ""
    (matrix,) = filter(None, [collector.add("module", joint + leaf, tensor) for leaf, tensor in tensors.items()])
    assert not collector.incomplete()
    return matrix, meaning


@pytest.mark.parametrize("name", SCHEMES)
def test_every_bit_counts(name):
    matrix, meaning = collected(SCHEMES[name], 96, 256)
    assert matrix.shape == (96, 256)
    assert torch.equal(matrix.dequantize(), meaning)


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_and_columns(name):
    """What ranks take: rows anywhere, columns between groups; each once more of what is left."""
    matrix, meaning = collected(SCHEMES[name], 96, 256)
    assert torch.equal(matrix[20:77].dequantize(), meaning[20:77])
    ids = torch.tensor([[70, 3], [3, 95]])
    assert torch.equal(kernel.gather(ids, matrix), meaning[ids])
    assert torch.equal(matrix.rows(20, 77)[10:30].dequantize(), meaning[30:50])
    assert torch.equal(matrix.columns(64, 192).dequantize(), meaning[:, 64:192])
    assert torch.equal(matrix.columns(64, 256)[5:90].columns(32, 96).dequantize(), meaning[5:90, 96:160])
    assert matrix.columns(64, 192)[:48].nbytes < matrix.nbytes / 3


@pytest.mark.parametrize("name", SCHEMES)
def test_a_rank_s_share_of_stacked_experts(name):
    """Stacked in one tensor or one by one: the second half of the experts, of the rows, of the columns."""
    scheme = SCHEMES[name]
    matrices = [collected(scheme, 64, 128) for _ in range(4)]
    expected = torch.stack([meaning for _, meaning in matrices])[2:, 32:, 64:]
    kind = type(matrices[0][0])
    fields = {key: getattr(matrices[0][0], key) for key in ("code", "block", "first") if hasattr(matrices[0][0], key)}
    tensors = zip(*(matrix.stored for matrix, _ in matrices), strict=True)
    names = ("values", "scales") if kind is BlockTensor else ("codes", "scales", "zeros")
    whole = kind(**fields, **{key: torch.stack(parts) for key, parts in zip(names, tensors, strict=False)})
    for stack in (whole, StackedTensor({e: matrix for e, (matrix, _) in enumerate(matrices)})):
        share = stack[2:].rows(32, 64).columns(64, 128)
        assert share.shape == (2, 32, 64)
        assert torch.equal(share.dequantize(), expected)
        assert torch.equal(share[1].dequantize(), expected[1])


@pytest.mark.parametrize("ranks", [4, 8])
def test_fp8_blocks_may_be_cut(ranks):
    """The published shared expert has 1280 columns in blocks of 128."""
    matrix, meaning = collected(quantised.fp8((128, 128)), 300, 1280)
    width = 1280 // ranks
    parts = [matrix.columns(rank * width, (rank + 1) * width) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts], 1), meaning)
    assert torch.equal(parts[-1][130:299][3:].dequantize(), meaning[133:299, -width:])


@pytest.mark.parametrize("name", ["AWQ", "compressed-tensors, asymmetric", "MXFP4 of compressed-tensors"])
def test_groups_may_not_be_cut(name):
    matrix, _ = collected(SCHEMES[name], 96, 256)
    with pytest.raises(ValueError, match="columns 16 to 64 of 256 would cut quantisation groups of 32 columns"):
        matrix.columns(16, 64)
    with pytest.raises(ValueError, match="columns 32 to 80 of 256 would cut quantisation groups of 32 columns"):
        matrix.columns(32, 80)
    with pytest.raises(ValueError, match="columns 64 to 288 do not lie in a matrix of 256"):
        matrix.columns(64, 288)


def test_ggml_blocks_may_not_be_cut():
    tensor, expected = packed("Q4_K", 3, 7, 512)
    assert torch.equal(tensor.columns(256, 512)[1].dequantize(), expected[1, :, 256:])
    with pytest.raises(ValueError, match="would cut Q4_K blocks of 256 columns"):
        tensor.columns(128, 512)


def test_a_scale_a_row_lets_columns_be_cut_anywhere():
    matrix, meaning = collected(SCHEMES["W8A8"], 8, 64)
    assert torch.equal(matrix.columns(3, 14).dequantize(), meaning[:, 3:14])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_ordinary_tensors_keep_their_dtype_and_memory(name):
    tensor = torch.randn(4, 6).to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name])
    matrix = plain(tensor)
    assert matrix.type.name == name and matrix.data.data_ptr() == tensor.data_ptr()
    assert torch.equal(matrix.dequantize(), tensor.float())


def test_codes_of_compressed_tensors_are_the_files():
    tensors, _ = quantised.compressed(4, 32).pack(torch.randn(16, 64))
    collector = PartCollector(Quantization.of(quantised.compressed(4, 32).config))
    matrix = [collector.add("module", leaf, tensor) for leaf, tensor in tensors.items()][-1]
    assert isinstance(matrix, GroupedTensor) and matrix.codes.data_ptr() == tensors["weight_packed"].data_ptr()


def test_equal_means_stored_alike():
    first, _ = collected(SCHEMES["FP8"], 64, 64)
    same = BlockTensor(first.values.clone(), first.scales.clone(), first.block)
    assert first.equals(same) and not first.equals(first[:32])
    same.values.view(torch.uint8)[5, 5] ^= 1
    assert not first.equals(same) and not first.equals(plain(first.dequantize()))
    codes, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2)
    assert not GroupedTensor(CODES["INT4"], codes, scales).equals(GroupedTensor(CODES["UINT4"], codes, scales))


def test_experts_of_different_kinds():
    """One by one, as a mixed checkpoint has them; -1 stands for another rank's expert."""
    sizes = (32, 64), (32, 64), (64, 32)
    gate, up, down = ([collected(SCHEMES[name], *size) for name in ("AWQ", "W8A8")] for size in sizes)
    stacks = [StackedTensor({e: matrix for e, (matrix, _) in enumerate(part)}) for part in (gate, up, down)]
    assert stacks[2].shape == (2, 64, 32)
    x, ids = torch.randn(3, 64), torch.tensor([[0, 1], [1, -1], [1, 0]])
    weights = torch.rand(3, 2)
    expected = torch.zeros(3, 64)
    for t, e, j in ((0, 0, 0), (0, 1, 1), (1, 1, 0), (2, 1, 0), (2, 0, 1)):
        hidden = torch.nn.functional.silu(gate[e][1] @ x[t]) * (up[e][1] @ x[t])
        expected[t] += weights[t, j] * (down[e][1] @ hidden)
    torch.testing.assert_close(kernel.experts(x, *stacks, weights, ids, None), expected, atol=1e-4, rtol=1e-4)
