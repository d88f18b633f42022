"""The backbone: embedding, decoder layers, final norm, head."""

from collections.abc import Iterable
from functools import partial

import torch
from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod
from sglang.srt.layers.utils import PPMissingLayer
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix, make_pp_layers
from torch import Tensor, nn

from sglang_step35.config import LayerSpec, ModelSpec, parse_config
from sglang_step35.hicache.identity import note_weight_update
from sglang_step35.model import single_rank
from sglang_step35.model.decoder import DecoderLayer, stages
from sglang_step35.model.graphed_layers import GraphedLayers
from sglang_step35.model.norm import RMSNorm
from sglang_step35.model.rotary import RotaryRows
from sglang_step35.model.vocab import PACKED_MODULES, TEXT_NAMES, PlainHead, embedding, name_parts, output_head
from sglang_step35.model.weights import load_backbone, refresh
from sglang_step35.model.widths import check_expert_ranks, check_ranks


class Step3p5Model(nn.Module):
    """The layers this pipeline rank holds. Letters: T tokens, H hidden size."""

    def __init__(self, spec: ModelSpec, quant_config=None, prefix: str = ""):
        super().__init__()
        self.pp_group = get_parallel().pp_group
        self.rows = RotaryRows()
        self.embed_tokens = PPMissingLayer()
        if self.pp_group.is_first_rank:
            self.embed_tokens = embedding(spec, quant_config, add_prefix("embed_tokens", prefix))
        self.layers, self.start_layer, self.end_layer = make_pp_layers(
            spec.num_layers,
            lambda idx, prefix: DecoderLayer(
                spec,
                spec.layers[idx],
                self.rows,
                idx,
                _next(spec, idx),
                quant_config=quant_config,
                prefix=prefix,
            ),
            prefix=add_prefix("layers", prefix),
            stage_facts=partial(_stage_facts, spec),
        )
        self.runs_single_rank = single_rank.usable(quant_config)
        self.graphed = GraphedLayers(self.layers)
        self.norm = PPMissingLayer(return_tuple=True)
        if self.pp_group.is_last_rank:
            self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> tuple[Tensor, Tensor | None] | PPProxyTensors:
        """input_ids [T], positions [T] int64 -> hidden states [T, H] after the final norm, and
        before it where the batch captures hidden states; PPProxyTensors on inner pipeline ranks.
        """
        self.rows.start(positions)
        if self.pp_group.is_first_rank:
            hidden = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
            if self.runs_single_rank:
                hidden = self.graphed(hidden, forward_batch)
                return self.norm(hidden), hidden
            residual_batch.start(forward_batch)
        else:
            first = self.layers[self.start_layer]
            hidden = first.attn_boundary.from_pp(pp_proxy_tensors, forward_batch)
        for index in range(self.start_layer, self.end_layer):
            hidden = self.layers[index](positions, hidden, forward_batch)
        if not self.pp_group.is_last_rank:
            return residual_batch.to_pp(hidden, forward_batch)
        return final_states(hidden, forward_batch, self.norm)


class Step3p5ForCausalLM(nn.Module):
    """Step-3.5's language model, registered in place of SGLang's model of the same name.

    config: a `Step35HFConfig`, or anything `parse_config` reads. Raises ConfigError; ValueError
    for server settings that would compute something else.
    """

    packed_modules_mapping = PACKED_MODULES
    hf_to_sglang_mapper = TEXT_NAMES

    def __init__(self, config, quant_config=None, prefix: str = ""):
        super().__init__()
        self.config = config
        self.spec = parse_config(config)
        check_ranks(self.spec)
        self.quant_config = quant_config
        name_parts(quant_config)
        self.pp_group = get_parallel().pp_group
        self.model = Step3p5Model(self.spec, quant_config, add_prefix("model", prefix))
        self.lm_head = PPMissingLayer()
        if self.pp_group.is_last_rank:
            self.lm_head = self._head(quant_config, add_prefix("lm_head", prefix))
            if self.model.runs_single_rank and type(self.lm_head.quant_method) is UnquantizedEmbeddingMethod:
                self.lm_head.quant_method = PlainHead()
        self.logits_processor = LogitsProcessor(config)
        self.weights_loaded = False

    def _head(self, quant_config, prefix: str) -> VocabParallelEmbedding:
        if not self.spec.tie_word_embeddings:
            return output_head(self.spec, quant_config, prefix)
        if self.pp_group.world_size > 1:
            raise ValueError("tie_word_embeddings needs one pipeline rank: start with --pp-size 1")
        return self.model.embed_tokens

    @property
    def start_layer(self) -> int:
        return self.model.start_layer

    @property
    def end_layer(self) -> int:
        return self.model.end_layer

    def get_attention_sliding_window_size(self) -> int | None:
        """Keys before the query's own that a sliding layer sees: SGLang's meaning of a window."""
        return None if self.spec.window is None else self.spec.earlier_keys

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ):
        """SGLang's LogitsProcessorOutput, with hidden states before the final norm where the batch
        captures them (what MTP layer 0 reads); PPProxyTensors on inner pipeline ranks.
        """
        out = self.model(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
        if not self.pp_group.is_last_rank:
            return out
        hidden, before_norm = out
        return self.logits_processor(
            input_ids, hidden, self.lm_head, forward_batch, hidden_states_before_norm=before_norm
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load a checkpoint's tensors, each exactly once; raises WeightError.

        After the first load SGLang's weight updates may bring any part of them.
        """
        if self.weights_loaded:
            note_weight_update()
        load_backbone(self, weights, complete=not self.weights_loaded)
        self.weights_loaded = True

    def post_load_weights(self) -> None:
        """SGLang calls this where it fills the parameters itself (dummy weights)."""
        refresh(self)

    def get_embed_and_head(self) -> tuple[Tensor, Tensor]:
        """Weights [V, H] of the embedding and the head, this rank's vocabulary shard; not of packed ones."""
        return self.model.embed_tokens.weight, self.lm_head.weight

    @classmethod
    def get_model_config_for_expert_location(cls, config) -> ModelConfigForExpertLocation | None:
        spec = parse_config(config)
        experts = {layer.moe.num_experts for layer in spec.layers if layer.moe}
        if not experts:
            return None
        (count,) = experts
        check_expert_ranks(count)
        return ModelConfigForExpertLocation(num_layers=spec.num_layers, num_logical_experts=count)


def final_states(hidden, forward_batch: ForwardBatch, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The last layer's output [T, H] after `norm`, and before it where the batch captures it."""
    before_norm = None
    hidden = residual_batch.complete_output(hidden, forward_batch)
    if forward_batch.capture_hidden_mode.need_capture() and len(hidden) > 0:
        before_norm = residual_batch.snapshot(hidden, forward_batch)
    return residual_batch.final_norm(hidden, forward_batch, norm, skip_empty=True), before_norm


def _next(spec: ModelSpec, index: int) -> LayerSpec | None:
    return spec.layers[index + 1] if index + 1 < spec.num_layers else None


def _stage_facts(spec: ModelSpec, index: int):
    """SGLang's layer stack asks this for layers that other pipeline ranks hold."""
    return stages(spec.layers[index], _next(spec, index))


EntryClass = Step3p5ForCausalLM
