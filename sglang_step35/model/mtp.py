"""The multi-token-prediction layers, all in one model.

MTP layer i at position t combines the embedding of token t + 1 + i with a hidden state of position
t (the backbone's before its final norm for i = 0, layer i - 1's output for i > 0), runs one decoder
layer over its own KV, and predicts token t + 2 + i.
Letters: S MTP layers, T tokens, R rows, H hidden size, V vocabulary.
"""

import dataclasses
import logging
from collections.abc import Iterable

import torch
from sglang.srt.layers.layer_boundary import layer_stack
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from sglang_step35.checkpoint.formats import open_files
from sglang_step35.config import LayerSpec, ModelSpec, parse_config
from sglang_step35.hicache.identity import note_weight_update
from sglang_step35.model import single_rank
from sglang_step35.model.decoder import DecoderLayer
from sglang_step35.model.graphed_layers import GraphedLayers
from sglang_step35.model.graphed_mtp import GraphedMTP, GraphedPass
from sglang_step35.model.mtp_pass import LayerPass
from sglang_step35.model.norm import RMSNorm
from sglang_step35.model.rotary import RotaryRows
from sglang_step35.model.shared_tables import SharedTables
from sglang_step35.model.vocab import PACKED_MODULES, TEXT_NAMES, keeps_packed, name_parts
from sglang_step35.model.weights import load_mtp, refresh

logger = logging.getLogger(__name__)


class MTPLayer(nn.Module):
    """enorm, hnorm, eh_proj, one decoder layer and the norm before the head."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec, depth: int, rows: RotaryRows, quant_config, prefix: str):
        super().__init__()
        size, eps = spec.hidden_size, spec.rms_norm_eps
        self.enorm = RMSNorm(size, eps)
        self.hnorm = RMSNorm(size, eps)
        # Quantised checkpoints leave it in BF16, but for those that pack everything.
        packed = quant_config if keeps_packed(quant_config) else None
        self.eh_proj = ReplicatedLinear(
            2 * size, size, bias=False, quant_config=packed, prefix=add_prefix("eh_proj", prefix)
        )
        # A stack of its own: the layer starts and ends the residual stream.
        with layer_stack():
            self.block = DecoderLayer(spec, layer, rows, kv_layer=depth, quant_config=quant_config, prefix=prefix)
        self.shared_head_norm = RMSNorm(size, eps)
        self.runs_single_rank = single_rank.usable(quant_config)
        self.graphed = GraphedLayers((self.block,))

    def forward(self, embeds: Tensor, positions: Tensor, hidden: Tensor, forward_batch: ForwardBatch) -> Tensor:
        """embeds, hidden [T, H] -> [T, H] before `shared_head_norm`."""
        x = self._input(embeds, hidden)
        if self.runs_single_rank:
            return self.graphed(x, forward_batch)
        residual_batch.start(forward_batch)
        x = self.block(positions, x, forward_batch)
        x = residual_batch.complete_output(x, forward_batch)
        out = residual_batch.snapshot(x, forward_batch)
        residual_batch.clear(forward_batch)
        return out

    def write_kv(self, embeds: Tensor, hidden: Tensor, forward_batch: ForwardBatch) -> None:
        """The part of `forward` that later rows read: embeds, hidden [T, H]."""
        x = self.block.input_layernorm(self._input(embeds, hidden))
        self.block.self_attn.write_kv(x, forward_batch)

    def _input(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """What the block reads, [T, H]; the embedding half comes first, as in the checkpoint's eh_proj."""
        if self.runs_single_rank:
            return single_rank.mtp_input(self, embeds, hidden)
        if len(embeds) == 0:
            return embeds
        x, _ = self.eh_proj(torch.cat((self.enorm(embeds), self.hnorm(hidden)), dim=-1))
        return x


class Step3p5MTP(nn.Module):
    """All MTP layers of a checkpoint, over one KV pool with layers 0 .. S - 1.

    SGLang's multi-layer EAGLE builds a draft model for each step; this one is built once and run
    layer by layer, in `start_pass` or with `forward_layer` and `compute_logits`. The embedding and the heads are the
    backbone's wherever the checkpoint's copies equal them, see `share_with`.
    """

    packed_modules_mapping = PACKED_MODULES
    hf_to_sglang_mapper = TEXT_NAMES

    def __init__(self, config, quant_config=None, prefix: str = "", draft_model_idx: int | None = None):
        super().__init__()
        if draft_model_idx is not None:
            raise ValueError(
                "sglang-step35 runs all MTP layers in one draft model; SGLang's own multi-layer "
                "EAGLE worker cannot drive it"
            )
        self.config = config
        self.spec = parse_config(config)
        self.quant_config = _mtp_quant_config(config, self.spec, quant_config)
        name_parts(self.quant_config)
        self.rows = RotaryRows()
        self.layers = nn.ModuleList(
            MTPLayer(
                self.spec,
                layer,
                depth,
                self.rows,
                self.quant_config,
                add_prefix(f"model.layers.{layer.index}", prefix),
            )
            for depth, layer in enumerate(self.spec.mtp_layers)
        )
        self.tables = SharedTables(self.spec, self.num_mtp_layers, self.quant_config)
        self.graphed = GraphedMTP(self.layers, self.tables)
        self.logits_processor = LogitsProcessor(config)
        self.start_layer, self.end_layer = 0, self.num_mtp_layers
        self.weights_loaded = False

    @property
    def num_mtp_layers(self) -> int:
        return len(self.spec.mtp_layers)

    def get_attention_sliding_window_size(self) -> int | None:
        """Keys before the query's own that a sliding layer sees: SGLang's meaning of a window."""
        return None if self.spec.window is None else self.spec.earlier_keys

    def start_pass(
        self, positions: Tensor, hidden: Tensor, last: Tensor, forward_batch: ForwardBatch
    ) -> LayerPass | GraphedPass:
        """All layers over the rows that attention has planned. positions: [T] int64. hidden: [T, H], the backbone's
        before its final norm. last: [B], the rows that predict a draft."""
        inputs = positions, hidden, last, forward_batch
        return self.graphed.start(*inputs) or LayerPass(self, *inputs)

    @torch.no_grad()
    def forward_layer(
        self,
        depth: int,
        input_ids: Tensor,
        positions: Tensor,
        hidden: Tensor,
        forward_batch: ForwardBatch,
    ) -> Tensor:
        """Run MTP layer `depth` over T rows, writing its KV at the batch's cache locations.

        input_ids: [T], token t + 1 + depth of row t. positions: [T] int64. hidden: [T, H]. Returns
        [T, H] before the head's norm: what `compute_logits` and layer depth + 1 take.
        """
        embeds = self._start(depth, input_ids, positions)
        return self.layers[depth](embeds, positions, hidden, forward_batch)

    @torch.no_grad()
    def write_kv(
        self, depth: int, input_ids: Tensor, positions: Tensor, hidden: Tensor, forward_batch: ForwardBatch
    ) -> None:
        """`forward_layer` for rows whose output nobody reads: their keys and values are written, no more.

        For attention backends with `write_kv`.
        """
        embeds = self._start(depth, input_ids, positions)
        self.layers[depth].write_kv(embeds, hidden, forward_batch)

    def _start(self, depth: int, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Look up what the rows of a layer need: embeddings [T, H], returned, and the rotary factors."""
        if depth == 0 or positions is not self.rows.positions:
            self.rows.start(positions)
        table = self.tables.embedding(depth)
        return single_rank.embed(input_ids, table) if self.layers[depth].runs_single_rank else table(input_ids)

    @torch.no_grad()
    def compute_logits(self, depth: int, hidden: Tensor, forward_batch: ForwardBatch | None = None) -> Tensor:
        """hidden [R, H] from `forward_layer` -> logits [R, V], gathered over tensor-parallel ranks.

        forward_batch: needed under data-parallel attention, where ranks have different R; its
        `global_num_tokens_for_logprob_cpu` and `_gpu` must hold every rank's R.
        """
        layer, head = self.layers[depth], self.tables.draft_head(depth, len(hidden))
        normed = layer.shared_head_norm(hidden) if len(hidden) > 0 else hidden
        if layer.runs_single_rank:
            return single_rank.logits(normed, head)
        metadata = _logits_metadata(forward_batch)
        return self.logits_processor(None, normed, head, metadata).next_token_logits

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch):
        """Layer 0 on `forward_batch.spec_info.hidden_states` [T, H], for SGLang's dummy runs."""
        hidden = forward_batch.spec_info.hidden_states
        out = self.forward_layer(0, input_ids, positions, hidden, forward_batch)
        normed = self.layers[0].shared_head_norm(out) if len(out) > 0 else out
        return self.logits_processor(
            input_ids, normed, self.tables.head(0), forward_batch, hidden_states_before_norm=out
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the MTP layers, each tensor exactly once; raises WeightError.

        SGLang's readers map the files into memory: of the backbone only the headers are read.
        """
        if self.weights_loaded:
            note_weight_update()
        copies = load_mtp(self, weights, complete=not self.weights_loaded)
        self.tables.keep(copies)
        self.weights_loaded = True

    def post_load_weights(self) -> None:
        """SGLang calls this where it fills the parameters itself (dummy weights)."""
        refresh(self)

    def share_with(self, target_model: nn.Module) -> dict[str, str]:
        """Use the embedding and head of the backbone's model instead of equal copies.

        Must be called before the first forward. Copies in the checkpoint that differ are kept as
        parameters of this model. Returns what each layer uses, e.g. {"layer 0 head": "own"}.
        """
        report = self.tables.resolve(target_model.get_input_embeddings(), target_model.lm_head)
        own = [use for use, source in report.items() if source != "backbone"]
        logger.info("MTP layers use their own %s", ", ".join(own) if own else "nothing: all shared")
        return report


def _mtp_quant_config(config, spec: ModelSpec, quant_config):
    """The quantisation of the MTP layers: the checkpoint's, unless it left them unquantised.

    Published quantised checkpoints keep these layers in BF16 and need not say so in their config.
    """
    if quant_config is None or not spec.mtp_layers or keeps_packed(quant_config):
        return quant_config
    if not getattr(quant_config, "is_checkpoint_fp8_serialized", True):
        return quant_config  # quantised while loading, whatever the checkpoint holds
    files = open_files(getattr(config, "_name_or_path", None))
    dtype = files.dtype(f"model.layers.{spec.mtp_layers[0].index}.mlp.down_proj.weight")
    return None if dtype in ("BF16", "F16", "F32") else quant_config


def _logits_metadata(forward_batch: ForwardBatch | None) -> LogitsMetadata:
    """Logits of every row given, nothing captured."""
    if forward_batch is None:
        return LogitsMetadata(forward_mode=ForwardMode.DECODE)
    return dataclasses.replace(
        LogitsMetadata.from_forward_batch(forward_batch),
        forward_mode=ForwardMode.DECODE,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        next_token_logits_buffer=None,
        extend_return_logprob=False,
        draft_extend_select_index=None,
    )


EntryClass = Step3p5MTP
