"""This rank's part of packed weights: rows, columns or experts, always views of what the reader gave.

SGLang's rules of division, which its own loaders of parameters apply to ordinary tensors. Raise ValueError where the
columns would be cut inside what shares a scale.
"""

from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from sglang_step35.packed.tensor import PackedTensor


def of_linear(layer: LinearBase, part: str | int | None, tensor: PackedTensor, rows: int, columns: int) -> PackedTensor:
    """rows, columns: of this rank's part of `part`, one of the matrices that the layer fuses."""
    rank, _ = get_group_rank_size(layer.tp_group)
    total_rows, total_columns = tensor.shape
    if rows != total_rows:
        # Ranks beyond the number of key/value heads hold copies.
        at = rank // layer.num_kv_head_replicas if part in ("k", "v") else rank
        tensor = tensor.rows(at * rows, (at + 1) * rows)
    return tensor if columns == total_columns else tensor.columns(rank * columns, (rank + 1) * columns)


def of_table(layer: VocabParallelEmbedding, tensor: PackedTensor) -> PackedTensor:
    """The tokens of this rank; the last one may have fewer, where the vocabulary was padded to divide."""
    start, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    return tensor if (start, end) == (0, tensor.shape[0]) else tensor.rows(start, end)


def of_experts(layer: FusedMoE, part: str, tensor: PackedTensor) -> PackedTensor:
    """Of one expert or a stack: rows of the gate ("w1") and of up ("w3"), columns of down ("w2")."""
    if layer.moe_tp_size == 1:
        return tensor
    width = layer.intermediate_size_per_partition
    start, end = layer.moe_tp_rank * width, (layer.moe_tp_rank + 1) * width
    return tensor.columns(start, end) if part == "w2" else tensor.rows(start, end)


def experts_here(layer: FusedMoE) -> range:
    """The experts that this rank keeps, of all."""
    start = layer.moe_ep_rank * layer.num_local_experts
    return range(start, start + layer.num_local_experts)
