"""Mixture of experts: a float32 sigmoid router with a selection bias, and SGLang's expert kernels.

Letters: T tokens, E experts, k chosen experts of a token, H hidden size.
"""

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe import (
    get_moe_a2a_backend,
    should_use_flashinfer_cutlass_moe_fp4_allgather,
)
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat
from sglang.srt.layers.moe.utils import RoutingMethodType
from sglang.srt.layers.quantization.gguf import GGUFConfig
from sglang.srt.layers.quantization.utils import is_layer_skipped
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from sglang_step35.config import LayerSpec, MoESpec
from sglang_step35.model import int4
from sglang_step35.model.experts import PlainExperts, runs_plain_torch
from sglang_step35.model.mlp import MLP
from sglang_step35.model.vocab import keeps_packed
from sglang_step35.packed.ggml import WIDEST_BLOCK
from sglang_step35.packed.sglang_gguf import ClampedExperts


def choose_experts(logits: Tensor, bias: Tensor | None, spec: MoESpec) -> tuple[Tensor, Tensor]:
    """The routing rule. score = sigmoid(logits); the k experts with the largest score + bias;
    weight = score of the chosen (without bias), made to sum to 1, times the scaling factor.

    logits: [T, E] float32. bias: [E] float32. Returns weights [T, k] float32, ids [T, k] int64.
    """
    scores = logits.sigmoid()
    ids = (scores if bias is None else scores + bias).topk(spec.top_k, sorted=False).indices
    weights = scores.gather(1, ids)
    if not spec.renormalize:
        return weights * spec.scaling_factor, ids
    return weights * (spec.scaling_factor / weights.sum(dim=-1, keepdim=True)), ids


class Router(nn.Module):
    """Scores all experts and chooses k. Kept: SGLang's TopK, its fused gate kernel, EPLB and
    recording of routed experts; on platforms without the kernel the rule above is its routing.
    """

    def __init__(self, spec: MoESpec, layer_id: int, hidden_size: int):
        super().__init__()
        self.spec = spec
        self.bias = None
        if spec.router_bias:
            bias = torch.zeros(spec.num_experts, dtype=torch.float32)
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.gate = ReplicatedLinear(
            hidden_size,
            spec.num_experts,
            bias=False,
            # Kept in float32, so that no step casts the whole matrix.
            params_dtype=torch.float32 if spec.fp32_router else None,
        )
        self.topk = TopK(
            top_k=spec.top_k,
            layer_id=layer_id,
            renormalize=spec.renormalize,
            scoring_func="sigmoid",
            correction_bias=self.bias,
            routed_scaling_factor=spec.scaling_factor,
            # `choose_experts` applies the factor itself.
            apply_routed_scaling_factor_on_output=not runs_plain_torch(),
            custom_routing_function=self._choose if runs_plain_torch() else None,
        )

    def forward(self, x: Tensor):
        """x [T, H] -> SGLang's top-k output: weights [T, k] float32, ids [T, k]."""
        if len(x) == 0:
            # A rank without tokens still takes part in the all-to-all of expert parallelism.
            return self.topk.empty_topk_output(x.device)
        logits, _ = self.gate(x.to(self.gate.weight.dtype))
        return self.topk(x, logits.float())

    def _choose(self, hidden_states, gating_output, topk, renormalize):
        return choose_experts(gating_output, self.bias, self.spec)


class MoE(nn.Module):
    """The routed experts and the shared expert of one layer; the boundary completes their sum.

    Parameters: `router` (gate [E, H] and bias [E], float32), `experts` (SGLang's FusedMoE),
    `share_expert`.
    """

    def __init__(self, layer: LayerSpec, hidden_size: int, quant_config=None, prefix: str = ""):
        super().__init__()
        spec = layer.moe
        moe_prefix = add_prefix("moe", prefix)
        self.router = Router(spec, layer.index, hidden_size)
        _check_blocks(spec, layer.index, quant_config)
        self.experts = _experts(spec, layer.index, hidden_size, quant_config, moe_prefix)
        self.router.topk.bind_runner_backend(
            self.experts.runner_backend, routing_method_type=self.experts.routing_method_type
        )
        clamps = getattr(self.experts.quant_method, "clamps_after_silu", False)
        _check_runner(spec, layer.index, self.experts.runner_backend, self.router.topk, clamps)
        _check_groups(layer.index, self.experts)

        share_prefix = add_prefix("share_expert", prefix)
        complete = _routed_output_is_complete()
        whole = complete or _cannot_shard(spec.shared_size, quant_config, share_prefix)
        self.share_expert = MLP(
            hidden_size,
            spec.shared_size,
            layer.limit_shared,
            quant_config,
            share_prefix,
            parallel_group="replicated" if whole else "tp",
        )
        # A whole shared expert inside a sum over ranks must be added once.
        ranks = get_parallel()
        self._adds_shared = complete or not whole or (ranks.moe_ep_rank, ranks.moe_tp_rank) == (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, H] -> [T, H]: scaled routed experts plus the unscaled shared expert."""
        # Before the routed experts, whose kernels may overwrite x.
        shared = self.share_expert(x) if self._adds_shared else None
        out = self.experts(x, self.router(x))
        return out if shared is None else out.add_(shared)


def _experts(spec: MoESpec, layer_id: int, hidden_size: int, quant_config, prefix: str) -> nn.Module:
    """SGLang's layer for the routed experts."""
    prefix = add_prefix("experts", prefix)
    return get_moe_impl_class(quant_config)(
        num_experts=spec.num_experts + get_exec().moe.ep_num_redundant_experts,
        top_k=spec.top_k,
        layer_id=layer_id,
        hidden_size=hidden_size,
        intermediate_size=spec.expert_size,
        quant_config=quant_config,
        prefix=prefix,
        routing_method_type=RoutingMethodType.SigmoidRenorm,
        gemm1_clamp_limit=spec.limit,
        quant_method=_own_method(quant_config, prefix),
    )


def _own_method(quant_config, prefix: str):
    """How to run the experts at `prefix` where SGLang's own choice would compute something else; None elsewhere."""
    if quant_config is None:
        return PlainExperts() if runs_plain_torch() else None
    if isinstance(quant_config, GGUFConfig):
        return ClampedExperts(quant_config)
    return int4.triton_method(quant_config, prefix)


def _check_runner(spec: MoESpec, layer_id: int, backend, topk: TopK, clamps: bool = False) -> None:
    """Refuse a MoE runner that would silently compute something else; raises ValueError.

    Read in SGLang 0.5.23: only the Triton runner clamps after silu; the others clamp before it
    or not at all. Runners that route by themselves know no selection bias. clamps: ours does so without a runner.
    """
    if topk.topk_config.output_format is not TopKOutputFormat.STANDARD:
        raise ValueError(
            f"the MoE runner {backend.value} routes without Step-3.5's selection bias: "
            f"start with --moe-runner-backend triton"
        )
    if spec.limit is not None and not clamps and (backend is None or not backend.is_triton()):
        raise ValueError(
            f"layer {layer_id} clamps its experts' SwiGLU at {spec.limit}, which the MoE runner "
            f"{getattr(backend, 'value', backend)} does not do: start with --moe-runner-backend triton"
        )


def _check_blocks(spec: MoESpec, layer_id: int, quant_config) -> None:
    """Refuse ranks that would cut an FP8 block; SGLang's own error names no remedy. Raises ValueError."""
    block = getattr(quant_config, "weight_block_size", None)
    ranks = get_parallel().moe_tp_size
    if block and ranks > 1:
        _check_cut(layer_id, spec.expert_size // ranks, ranks, max(block))


def _check_groups(layer_id: int, experts: nn.Module) -> None:
    """Refuse ranks that would cut a quantisation group; raises ValueError.

    SGLang's compressed-tensors experts then hold too few scales, each of the wrong columns.
    """
    group = getattr(experts.scheme, "group_size", None) or -1
    if group > 0:
        _check_cut(layer_id, experts.intermediate_size_per_partition, experts.moe_tp_size, group)


def _check_cut(layer_id: int, width: int, ranks: int, group: int) -> None:
    if width % group:
        raise ValueError(
            f"layer {layer_id}: {ranks} tensor-parallel ranks hold {width} columns of each expert "
            f"(moe_intermediate_size), no multiple of the checkpoint's quantisation groups of {group}: start with "
            f"--ep-size = --tp-size, which keeps experts whole"
        )


def _routed_output_is_complete() -> bool:
    """Whether the routed experts return complete sums for this rank's own tokens."""
    a2a = get_moe_a2a_backend()
    return not a2a.is_none() or should_use_flashinfer_cutlass_moe_fp4_allgather()


def _cannot_shard(size: int, quant_config, prefix: str) -> bool:
    """Whether the shared expert's width does not divide by the ranks, or not into what its kernels take at once.

    1280 wide in blocks of 128 does not split over 4 ranks or more, in GGML's blocks of 256 not over two.
    """
    block = getattr(quant_config, "weight_block_size", None)
    if keeps_packed(quant_config):
        block = (WIDEST_BLOCK,)
    if block is None and quant_config is not None and quant_config.get_name() in (*int4.NAMES, "compressed_tensors"):
        block = (int4.MARLIN_COLUMNS,)
    ranks = get_parallel().tp_size
    if size % ranks:
        return True
    if block is None or ranks == 1 or size // ranks % max(block) == 0:
        return False
    ignored = getattr(quant_config, "ignored_layers", None) or []
    return not is_layer_skipped(add_prefix("down_proj", prefix), ignored)
