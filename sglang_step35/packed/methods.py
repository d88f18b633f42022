"""SGLang's quantisation methods over packed weights, for platforms without its kernels.

Parameters are named as SGLang names those of its own GGUF methods: `qweight`, `w13_qweight`, `w2_qweight`.
Letters: T tokens, H hidden size.
"""

from functools import partial

import torch
import torch.nn.functional as F
from sglang.srt.layers.linear import LinearBase, QKVParallelLinear
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
)
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.runtime_context import get_exec
from torch import Tensor, nn

from sglang_step35.checkpoint.quantization import Quantization
from sglang_step35.names import PACKED_METHOD
from sglang_step35.packed import kernel, ranks
from sglang_step35.packed.parameter import PackedParameter
from sglang_step35.packed.tensor import PackedTensor


class PackedConfig(QuantizationConfig):
    """Quantised checkpoints on the portable platform: every linear layer, the routed experts, the embedding and the
    head take what their file has, packed or not.

    declared: the checkpoint's `quantization_config`; None for GGUF, whose tensors say all.
    """

    def __init__(self, declared: Quantization | None = None):
        super().__init__()
        self.declared = declared

    def get_name(self) -> str:
        return PACKED_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where SGLang looks if config.json has no `quantization_config`; it raises without either."""
        return ["quantization_config.json"]

    @classmethod
    def from_config(cls, config: dict) -> "PackedConfig":
        """config: `quantization_config` of config.json, empty for GGUF. Raises QuantizationError."""
        return cls(Quantization.of(config) if config else None)

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return PackedLinear()
        if isinstance(layer, VocabParallelEmbedding):
            return PackedTable()
        return PackedExperts() if isinstance(layer, FusedMoE) else None


class PackedLinear(LinearMethodBase):
    """x times a packed matrix, or several that SGLang fuses into one layer."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_attributes,
    ) -> None:
        parts = _parts(layer, len(output_partition_sizes))
        rows = dict(zip(parts, output_partition_sizes, strict=True))

        def cut(part, tensor: PackedTensor) -> PackedTensor:
            return ranks.of_linear(layer, part, tensor, rows[part], input_size_per_partition)

        prepares = params_dtype is not torch.float32
        layer.register_parameter("qweight", PackedParameter.of(*parts, cut=cut, prepares=prepares))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, columns] -> [T, rows]."""
        out = kernel.linear(x, self._rows(layer, x))
        return out if bias is None else out + bias

    def _rows(self, layer: nn.Module, _x: Tensor) -> list[PackedTensor]:
        """The parts that x is multiplied by."""
        return layer.qweight.rows()


class PackedTable(PackedLinear):
    """The embedding and the head [V, H]; `apply` gives the head's logits."""

    def create_weights(self, layer: nn.Module, *_sizes, params_dtype: torch.dtype, **_attributes) -> None:
        # Of an embedding single rows are read. Copies of the head are compared with what its file has.
        prepares = isinstance(layer, ParallelLMHead) and params_dtype is not torch.float32
        own = dict(cut=lambda _, rows: ranks.of_table(layer, rows), prepares=prepares, keeps=True)
        layer.register_parameter("qweight", PackedParameter.of(None, **own))
        layer.params_dtype = params_dtype

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, H] -> logits [T, rows of the longest rank], which the ranks can gather."""
        logits = super().apply(layer, x, bias)
        return F.pad(logits, (0, layer.num_embeddings_per_partition - logits.shape[-1]))

    def _rows(self, layer: nn.Module, x: Tensor) -> list[PackedTensor]:
        """By x in float32, which `--enable-fp32-lm-head` makes of it, those that were given: exactly."""
        return layer.qweight.as_given() if x.dtype is torch.float32 else layer.qweight.rows()

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """ids [T] -> [T, H] in the model's dtype."""
        (table,) = layer.qweight.rows()
        return kernel.gather(ids, table).to(layer.params_dtype)


class PackedExperts(FusedMoEMethodBase):
    """The routed experts of this rank, stacked [E, rows, columns] as the file has them."""

    clamps_after_silu = True

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_attributes,
    ) -> None:
        moe = get_exec().moe
        if moe.enable_eplb or moe.ep_num_redundant_experts:
            raise ValueError("packed experts stay where they are: remove --enable-eplb and --ep-num-redundant-experts")
        own = dict(
            cut=partial(ranks.of_experts, layer),
            experts=ranks.experts_here(layer),
            prepares=params_dtype is not torch.float32,
        )
        layer.register_parameter("w13_qweight", PackedParameter.of("w1", "w3", **own))
        layer.register_parameter("w2_qweight", PackedParameter.of("w2", **own))

    def create_moe_runner(self, layer: nn.Module, moe_runner_config) -> None:
        self.moe_runner_config = moe_runner_config

    def apply(self, layer: nn.Module, dispatch_output) -> StandardCombineInput:
        weights, ids, *_ = dispatch_output.topk_output
        return StandardCombineInput(hidden_states=self.run(layer, dispatch_output.hidden_states, weights, ids))

    def run(self, layer: nn.Module, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `kernel.experts`."""
        (gate, up), (down,) = layer.w13_qweight.rows(), layer.w2_qweight.rows()
        return kernel.experts(x, gate, up, down, weights, ids, self.moe_runner_config.gemm1_clamp_limit)


def _parts(layer: nn.Module, count: int) -> tuple[str | int | None, ...]:
    """What SGLang calls the parts of this layer."""
    if isinstance(layer, QKVParallelLinear):
        return ("q", "k", "v")
    return (None,) if count == 1 else tuple(range(count))
