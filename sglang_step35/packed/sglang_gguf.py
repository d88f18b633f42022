"""GGUF on CUDA: SGLang's own layers and kernels, and what its experts lack for this model.

Run on no GPU yet: tests build it on the meta device and run the experts with a stand-in for the CUDA kernel.
Letters: T tokens, k chosen experts of a token, E experts, H hidden size, I intermediate size.
"""

import torch
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization import gguf as stock
from torch import Tensor, nn

from sglang_step35.model.mlp import swiglu
from sglang_step35.packed.ggml import GGMLTensor


class ClampedExperts(stock.GGUFMoEMethod):
    """SGLang's GGUF experts. Kept: parameters, loading, its fused kernels; added: the weights are put together after
    loading (SGLang 0.5.23 does so for NPUs only), and layers with a SwiGLU clamp run expert by expert."""

    clamps_after_silu = True

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.materialize_gguf_weights()

    def apply(self, layer: nn.Module, dispatch_output) -> StandardCombineInput:
        limit = self.moe_runner_config.gemm1_clamp_limit
        if limit is None:
            return super().apply(layer, dispatch_output)
        x, (weights, ids, *_) = dispatch_output.hidden_states, dispatch_output.topk_output
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in ids.unique().tolist():
            if expert < 0:
                continue
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, up = _product(x[token], layer, "w13", expert).chunk(2, dim=-1)
            rows = _product(swiglu(gate, up, limit), layer, "w2", expert)
            out.index_add_(0, token, rows.float() * weights[token, slot].unsqueeze(-1))
        return StandardCombineInput(hidden_states=out.to(x.dtype))


def _product(x: Tensor, layer: nn.Module, which: str, expert: int) -> Tensor:
    weight, kind = getattr(layer, f"{which}_qweight"), getattr(layer, f"{which}_qweight_type")
    return stock.fused_mul_mat_gguf(x, weight[expert], kind.weight_type)


def as_sglang_takes_it(tensor: GGMLTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(type, weight) for the parameters `qweight_type` and `qweight` of SGLang's GGUF layers.

    The type: a number, one for each expert of a stack. The weight: bytes of quantised types, floats of others.
    """
    kind = torch.tensor(tensor.type.number)
    if len(tensor.shape) == 3:
        kind = kind.expand(tensor.shape[0])
    return kind, tensor.dequantize().to(dtype) if tensor.type.plain else tensor.data


def load_table(table: nn.Module, tensor: GGMLTensor, dtype: torch.dtype) -> None:
    """Fill an embedding or a head."""
    kind, weight = as_sglang_takes_it(tensor, dtype)
    for parameter, value in ((table.qweight_type, kind), (table.qweight, weight)):
        parameter.weight_loader(parameter, value)
    table.quant_method.process_weights_after_loading(table)
