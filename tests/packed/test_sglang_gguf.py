"""GGUF in SGLang's own layers, as on CUDA: loading, and the arithmetic around its kernels.

The CUDA kernels themselves are replaced by plain products; no GPU has run this path.
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Q
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.quantization import gguf as stock

from sglang_step35.checkpoint.gguf import GGUFFiles
from sglang_step35.model.causal_lm import Step3p5ForCausalLM
from sglang_step35.model.mtp import Step3p5MTP
from sglang_step35.packed.ggml import TYPES, GGMLTensor
from tests.packed.test_model import SMALL, converted, prompt
from tests.support import model_host

KINDS = {kind.number: kind for kind in TYPES.values()}


def product(x, qweight, qweight_type):
    """SGLang's `fused_mul_mat_gguf` in plain torch."""
    kind = KINDS[int(qweight_type)]
    weight = qweight if kind.plain else GGMLTensor(kind, qweight).dequantize()
    return x @ weight.T


def rows(ids, qweight, qweight_type, hidden_size, dtype=None):
    kind = KINDS[int(qweight_type)]
    return qweight[ids] if kind.plain else GGMLTensor(kind, qweight[ids]).dequantize()


def experts(x, w1, w2, topk_weights, topk_ids, qweight_type, qweight_type2, activation):
    """SGLang's `fused_moe_gguf`, which knows no clamp."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for weight, e in zip(topk_weights[t], topk_ids[t].tolist(), strict=True):
            gate, up = product(x[t], w1[e], qweight_type).chunk(2, dim=-1)
            out[t] += weight * product(F.silu(gate) * up, w2[e], qweight_type2)
    return out


def build(cls, file, device: str = "cpu"):
    if model_host.publish_role() is None:
        model_host.start_runtime(file)
    config = ModelConfig(str(file), is_draft_model=cls is Step3p5MTP, dtype="float32", quantization="gguf").hf_config
    config._name_or_path = str(file)
    with torch.device(device):
        return cls(config, quant_config=stock.GGUFConfig())


def load(cls, file):
    model = build(cls, file)
    model.load_weights(GGUFFiles(file).tensors())
    for module in model.modules():
        if getattr(module, "quant_method", None) is not None:
            module.quant_method.process_weights_after_loading(module)
    return model


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(stock, "fused_mul_mat_gguf", product)
    monkeypatch.setattr(stock, "apply_gguf_embedding", rows)
    monkeypatch.setattr(stock, "fused_moe_gguf", experts)


def mixed(name: str) -> Q:
    return Q.Q4_0 if "v_proj" in name or "moe" in name else Q.F16 if "o_proj" in name else Q.Q8_0


def test_construction_on_the_meta_device(tmp_path):
    file, _ = converted(tmp_path, SMALL, mixed)
    names = {name.rsplit(".", 1)[-1] for name, _ in build(Step3p5ForCausalLM, file, "meta").named_parameters()}
    assert {"qweight", "qweight_type", "w13_qweight", "w2_qweight_type"} <= names
    assert build(Step3p5MTP, file, "meta").num_mtp_layers == 3


def test_logprobs(tmp_path, kernels):
    """Parts of different types in one layer, and layers with a clamp."""
    file, reference = converted(tmp_path, SMALL, mixed)
    backbone, mtp, ids = load(Step3p5ForCausalLM, file), load(Step3p5MTP, file), prompt(24)
    found = model_host.all_logits(backbone, ids).log_softmax(-1)
    assert (found - reference.logprobs(ids)).abs().max() < 1e-4
    mtp.share_with(backbone)
    drafts = model_host.mtp_logits(mtp, reference.hidden_before_norm(ids), ids)
    for logits, expected in zip(drafts, reference.mtp_logits(ids), strict=True):
        assert (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 1e-4


def test_the_clamp_is_there(tmp_path, kernels):
    """Without it the same layers give other log-probabilities."""
    file, reference = converted(tmp_path, replace(SMALL, experts=4), mixed)
    model = load(Step3p5ForCausalLM, file)
    for layer in model.model.layers[SMALL.dense_layers :]:
        layer.mlp.experts.quant_method.moe_runner_config.gemm1_clamp_limit = None
    found = model_host.all_logits(model, prompt(24)).log_softmax(-1)
    assert (found - reference.logprobs(prompt(24))).abs().max() > 1e-3
    assert max(json.loads((tmp_path / "config.json").read_text())["swiglu_limits"]) > 0
