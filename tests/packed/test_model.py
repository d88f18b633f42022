"""The model on packed weights against a float32 model on what `gguf.quants.dequantize` makes of them."""

import json
from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType as Q

from sglang_step35.packed import ik_check
from sglang_step35.packed.ggml import TYPES
from sglang_step35.packed.parameter import PackedParameter
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.gguf_files import write_gguf
from tests.support.reference import Reference

TOLERANCE = 1e-4
SMALL = CheckpointShape(residual=0.5)  # widths are multiples of 32
K_WIDE = CheckpointShape(  # widths are multiples of 256
    num_layers=5, hidden_size=256, heads=4, sliding_heads=8, kv_groups=2, head_dim=64, dense_size=256,
    expert_size=256, shared_size=256, experts=4, top_k=2, residual=0.5,
)  # fmt: skip


def k_mix(name: str) -> Q:
    """About what llama.cpp's Q4_K_M does."""
    if any(part in name for part in ("v_proj", "down_proj", "lm_head")):
        return Q.Q6_K
    return Q.Q5_K if "o_proj" in name or "eh_proj" in name else Q.Q4_K


def float_mix(name: str) -> Q:
    return Q.F16 if "self_attn" in name else Q.F32 if "down_proj" in name else Q.BF16


FILES = {
    "Q8_0": (SMALL, lambda name: Q.Q8_0),
    "Q4_0 with a Q8_0 head": (SMALL, lambda name: Q.Q8_0 if name == "lm_head.weight" else Q.Q4_0),
    "floats": (SMALL, float_mix),
    "K-quants": (K_WIDE, k_mix),
}


def prompt(length: int) -> list[int]:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def converted(folder, shape, quantise, **options):
    """(first file, reference on the dequantised weights)."""
    make_checkpoint(folder, shape)
    weights = write_gguf(folder, folder / "model.gguf", quantise, **options)
    fields = json.loads((folder / "config.json").read_text())
    file = next(iter(sorted(folder.glob("*.gguf"))))
    return file, Reference(fields, {name: torch.from_numpy(weight.copy()) for name, weight in weights.items()})


@pytest.fixture(scope="module", params=FILES)
def loaded(request, tmp_path_factory):
    """(backbone, MTP layers, reference)."""
    file, reference = converted(tmp_path_factory.mktemp("gguf"), *FILES[request.param])
    (file.parent / "config.json").unlink()  # the file alone must do
    backbone, mtp = model_host.load_gguf(file), model_host.load_gguf(file, draft=True)
    mtp.share_with(backbone)
    return backbone, mtp, reference


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_logprobs(loaded, length):
    """The window is 8."""
    backbone, _, reference = loaded
    found = model_host.all_logits(backbone, prompt(length)).log_softmax(-1)
    assert (found - reference.logprobs(prompt(length))).abs().max() < TOLERANCE


def test_mtp_logprobs(loaded):
    _, mtp, reference = loaded
    ids = prompt(40)
    found = model_host.mtp_logits(mtp, reference.hidden_before_norm(ids), ids)
    for logits, expected in zip(found, reference.mtp_logits(ids), strict=True):
        assert (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < TOLERANCE


def test_mtp_keys_and_values_alone(loaded):
    _, mtp, reference = loaded
    ids = prompt(40)
    found = model_host.last_mtp_logits(mtp, reference.hidden_before_norm(ids), ids).log_softmax(-1)
    assert (found - reference.mtp_logits(ids)[0][-1].log_softmax(-1)).abs().max() < TOLERANCE


def test_weights_stay_packed(loaded):
    """Floats are kept of norms, routers and head gates only; the rest is the file's own bytes."""
    for model in loaded[:2]:
        plain = {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if not isinstance(p, PackedParameter)}
        assert plain <= {"norm", "shared_head_norm", "enorm", "hnorm", "q_norm", "k_norm", "gate", "router", "g_proj",
                         "input_layernorm", "post_attention_layernorm"}  # fmt: skip
        packed = [p for p in model.parameters() if isinstance(p, PackedParameter)]
        assert packed and all(part.data.dtype is torch.uint8 for p in packed for part in p.rows())


def test_bfloat16_activations(tmp_path):
    file, reference = converted(tmp_path, replace(SMALL, residual=0.3), lambda name: Q.Q8_0)
    found = model_host.all_logits(model_host.load_gguf(file, dtype="bfloat16"), prompt(24))
    agreement = (found.argmax(-1) == reference.logits(prompt(24)).argmax(-1)).float().mean()
    assert agreement > 0.9


def test_a_split_file_without_mtp_layers(tmp_path):
    file, reference = converted(tmp_path, SMALL, lambda name: Q.Q8_0, mtp=False, shards=3)
    assert file.name.startswith("model-00001-of-")
    (tmp_path / "config.json").unlink()
    backbone = model_host.load_gguf(file)
    assert not backbone.spec.mtp_layers
    found = model_host.all_logits(backbone, prompt(12)).log_softmax(-1)
    assert (found - reference.logprobs(prompt(12))).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_heads_and_embeddings_are_shared(tmp_path, dtype):
    """Equal bytes of one type, however the kernels order a head's rows; another head is the layer's own."""
    shape = replace(SMALL, embedding_copies=True)

    def edit(metadata, tensors):
        tensors["blk.9.nextn.shared_head_head.weight"] = tensors["output.weight"]

    file, _ = converted(tmp_path, shape, lambda name: Q.Q8_0, edit=edit)
    backbone, mtp = (model_host.load_gguf(file, draft=draft, dtype=dtype) for draft in (False, True))
    report = mtp.share_with(backbone)
    assert [report[f"layer {i} head"] for i in range(3)] == ["backbone", "own", "own"]
    assert {report[f"layer {i} embedding"] for i in range(3)} == {"backbone"}
    heads = [mtp.tables.head(depth).qweight.rows()[0].type.name for depth in range(3)]
    interleaved = dtype == "bfloat16" and ik_check.usable()
    assert heads == ["Q8_0_R8" if interleaved else "Q8_0"] * 3


def test_a_head_of_float32_activations(tmp_path):
    """Those of `--enable-fp32-lm-head`, however the kernels order the rows."""
    file, reference = converted(tmp_path, SMALL, lambda name: Q.Q8_0)
    head, hidden = model_host.load_gguf(file, dtype="bfloat16").lm_head, torch.randn(5, 64)
    expected = hidden @ reference.weights["lm_head.weight"].float().T
    assert (head.quant_method.apply(head, hidden) - expected).abs().max() < TOLERANCE


def test_a_config_beside_the_file_counts(tmp_path):
    """SGLang reads it first; a checkpoint whose metadata lack something is served so."""
    file, reference = converted(tmp_path, SMALL, lambda name: Q.Q8_0, edit=lambda m, t: m.pop("step35.rope.freq_base"))
    found = model_host.all_logits(model_host.load_gguf(file), prompt(12)).log_softmax(-1)
    assert (found - reference.logprobs(prompt(12))).abs().max() < TOLERANCE


def test_types_cover_the_published_files():
    assert {"Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "MXFP4", "F16", "BF16", "F32"} == set(TYPES)
