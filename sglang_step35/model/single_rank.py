"""The same layers on one rank in plain torch: `DecoderLayer.forward` without SGLang's wrappers.

On a CPU and a small model the wrappers (layer boundaries, parallel linear layers, expert dispatch)
take as long as the arithmetic. Where nothing is summed over ranks or moved between them, these
functions compute the same numbers from the same modules' parameters, packed ones too.
Letters: T tokens, H hidden size, Q query heads, K key/value heads, D head_dim,
R rows, V vocabulary.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_exec, get_parallel
from torch import Tensor, nn

from sglang_step35.model.attention import GatedAttention
from sglang_step35.model.decoder import DecoderLayer
from sglang_step35.model.experts import runs_plain_torch
from sglang_step35.model.mlp import MLP, swiglu
from sglang_step35.model.moe import MoE, choose_experts
from sglang_step35.model.norm import RMSNorm, rms_norm
from sglang_step35.model.product import is_packed, of_layer
from sglang_step35.names import PACKED_METHOD


def usable(quant_config) -> bool:
    """Whether these functions may stand in for SGLang's path."""
    parallel, execution = get_parallel(), get_exec()
    alone = parallel.tp_size == parallel.pp_size == 1
    # What SGLang's wrappers do besides: a float32 head, records of the chosen experts.
    extras = (
        execution.features.enable_fp32_lm_head
        or execution.features.enable_return_routed_experts
        or execution.moe.expert_distribution_recorder_mode is not None
    )
    ours = quant_config is None or quant_config.get_name() == PACKED_METHOD
    return runs_plain_torch() and alone and ours and not extras


def decoder_layers(layers: Iterable[DecoderLayer], x: Tensor, forward_batch) -> Tensor:
    """x [T, H] -> [T, H], the residual stream before and after the layers."""
    for layer in layers:
        x = x + _attention(layer.self_attn, _norm(layer.input_layernorm, x), forward_batch)
        x = x + _ffn(layer.mlp, _norm(layer.post_attention_layernorm, x))
    return x


def mtp_input(layer: nn.Module, embeds: Tensor, hidden: Tensor) -> Tensor:
    """embeds, hidden [T, H] -> [T, H]: what an MTP layer's block reads, both norms at once."""
    scales = torch.stack((layer.enorm.scale, layer.hnorm.scale))
    pair = rms_norm(torch.stack((embeds, hidden), dim=1), scales, layer.enorm.eps_length)  # [T, 2, H]
    return of_layer(layer.eh_proj, pair.flatten(1))


def embed(ids: Tensor, table: VocabParallelEmbedding) -> Tensor:
    """ids [T] -> [T, H]."""
    if is_packed(table):
        return table.quant_method.embedding(table, ids)
    return F.embedding(ids, table.weight)


def logits(hidden: Tensor, table: VocabParallelEmbedding) -> Tensor:
    """hidden [R, H], normed -> [R, V] float32."""
    found = table.quant_method.apply(table, hidden) if is_packed(table) else of_layer(table, hidden)
    return found[:, : table.org_vocab_size].float()


def _norm(module: RMSNorm, x: Tensor) -> Tensor:
    return rms_norm(x, module.scale, module.eps_length)


def _attention(module: GatedAttention, x: Tensor, forward_batch) -> Tensor:
    q, k, v = module.qk_norm_rope.heads(of_layer(module.qkv_proj, x))
    # Flat queries, as SGLang's own backends expect them.
    out = get_attn_backend().forward(q.flatten(1), k, v, module.attn, forward_batch)
    if module.g_proj is not None:
        out = module.gate_heads(out, F.linear(x, module.g_proj.weight))
    return of_layer(module.o_proj, out)


def _ffn(module: MLP | MoE, x: Tensor) -> Tensor:
    if isinstance(module, MLP):
        return _mlp(module, x)
    router, experts = module.router, module.experts
    logits = F.linear(x.to(router.gate.weight.dtype), router.gate.weight).float()
    weights, ids = choose_experts(logits, router.bias, router.spec)
    out = experts.quant_method.run(experts, x, weights, ids)
    return out.add_(_mlp(module.share_expert, x))


def _mlp(module: MLP, x: Tensor) -> Tensor:
    gate, up = of_layer(module.gate_up_proj, x).chunk(2, dim=-1)
    return of_layer(module.down_proj, swiglu(gate, up, module.activation.limit))
