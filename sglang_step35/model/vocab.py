"""The vocabulary's tables, and how SGLang's fused layers name their parts."""

from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.models.utils import WeightsMapper
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from sglang_step35.checkpoint.names import TEXT_PREFIX
from sglang_step35.config import ModelSpec
from sglang_step35.model import product
from sglang_step35.names import PACKED_METHOD

# SGLang's fused linear layers and the checkpoint's names for their parts.
PACKED_MODULES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


# A quantisation of Step-3.7 lists layers by the checkpoint's names.
TEXT_NAMES = WeightsMapper(orig_to_new_prefix={TEXT_PREFIX: "model."})


def name_parts(quant_config) -> None:
    """Tell a quantisation these names; AutoRound's, which may quantise each part differently, gets them from nobody."""
    if quant_config is not None and not quant_config.packed_modules_mapping:
        quant_config.update_packed_modules_mapping(PACKED_MODULES)


def keeps_packed(quant_config) -> bool:
    """Whether every linear layer, the experts and the vocabulary's tables keep the file's packed rows: our own methods,
    and SGLang's for GGUF."""
    return quant_config is not None and quant_config.get_name() in (PACKED_METHOD, "gguf")


class PlainHead(UnquantizedEmbeddingMethod):
    """Unquantised logits by `product.linear`. SGLang multiplies by itself where a head's method has a name it knows."""

    def apply(self, layer: VocabParallelEmbedding, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [R, H] -> logits [R, V] in x's dtype."""
        logits = product.linear(x, layer.weight)
        return logits if bias is None else logits + bias


def embedding(spec: ModelSpec, quant_config=None, prefix: str = "") -> VocabParallelEmbedding:
    """The input embedding [V, H]; whole on each rank under data-parallel attention."""
    return VocabParallelEmbedding(
        spec.vocab_size,
        spec.hidden_size,
        quant_config=quant_config,
        enable_tp=not is_dp_attention_enabled(),
        prefix=prefix,
    )


def output_head(spec: ModelSpec, quant_config=None, prefix: str = "") -> ParallelLMHead:
    """The head [V, H], sharded over the vocabulary."""
    return ParallelLMHead(
        spec.vocab_size,
        spec.hidden_size,
        quant_config=quant_config,
        use_attn_tp_group=get_parallel().enable_dp_lm_head,
        prefix=prefix,
    )
