"""Heads in fewer bits for drafts alone, beside those that verification reads.

Every draft reads a head, as many bytes as an MTP layer and more, and those of the vocabulary stay in 16 bits in most
quantised checkpoints. A copy in 8 bits serves, and for one or two requests, where the CPU multiplies int8, one in 2
bits: it tells which logits are large, and the rows of the head itself give these anew. A draft may come from any
distribution, verification corrects for it (Leviathan et al. 2023), and the layers' KV does not depend on it. What 8
bits cost is a draft in a hundred that another token would have been.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

import torch
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import Tensor, nn

from sglang_step35.hicache.identity import weight_updates
from sglang_step35.model.product import LARGE, is_packed
from sglang_step35.packed import ik_kernel
from sglang_step35.packed.ggml import plain
from sglang_step35.packed.methods import PackedTable
from sglang_step35.packed.prepare import can_round, can_screen, rounded, screened
from sglang_step35.packed.tensor import PackedTensor

GROUP, GROUPS = 8, 128  # tokens side by side, as rows are interleaved; groups whose logits are computed anew
FEW = 2  # rows, at most: for more, unpacking and choosing take longer than reading 8 bits
WORTH = 1 << 24  # bytes, at least, that a copy in 2 bits spares: choosing takes about as long as reading half of them

Copies = tuple[VocabParallelEmbedding | None, VocabParallelEmbedding | None]  # in 2 bits, in 8


class RoundedTable(PackedTable):
    """Of a copy in 8 bits."""

    written = staticmethod(rounded)


class ScreenedTable(PackedTable):
    """Of a copy in 2 bits: logits of which the largest are the head's own."""

    written = staticmethod(screened)

    def __init__(self, head: VocabParallelEmbedding):
        self._head = ref(head)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = super().apply(layer, x, bias)
        if x.dtype is not torch.float32:  # by which the head itself is multiplied
            (screen,) = layer.qweight.rows()
            self.refine(logits[:, : screen.shape[0]], x)
        return logits

    def refine(self, logits: Tensor, x: Tensor) -> None:
        """Put the head's own logits of x [T, H] where this copy's [T, rows] are largest."""
        head = self._head()
        assert head is not None  # it leaves together with its copy
        groups = logits.unflatten(-1, (-1, GROUP))
        best = groups.amax(-1).topk(min(GROUPS, groups.shape[1])).indices
        own = ik_kernel.of_groups(x, _kept(head), best, GROUP)
        groups.scatter_(1, best.unsqueeze(-1).expand_as(own), own.to(logits.dtype))


class DraftHeads:
    """The copies by the heads they are of, which this process may load anew."""

    def __init__(self, make: Callable[[], VocabParallelEmbedding]):
        """make: a head of this rank's whose rows stay packed, without any yet."""
        self._make = make
        self._copies: WeakKeyDictionary[nn.Module, Copies] = WeakKeyDictionary()
        self._updates = weight_updates()

    def of(self, head: VocabParallelEmbedding, rows: int) -> VocabParallelEmbedding:
        """What so many rows are multiplied by: a copy, or the head itself where it is small, or has no more bits, or
        memory is short."""
        if self._updates != weight_updates():
            self._renew()
        if head not in self._copies:
            self._copies[head] = self._of(head)
        screen, eight_bits = self._copies[head]
        return (screen if rows <= FEW else None) or eight_bits or head

    def _of(self, head: VocabParallelEmbedding) -> Copies:
        matrix = _matrix(head)
        rows, columns = matrix.shape
        if rows * columns < LARGE:
            return None, None
        eight_bits = self._copy(matrix, RoundedTable()) if can_round(matrix) else None
        screens = can_screen(matrix, WORTH) and ik_kernel.reads(_kept(head))
        return self._copy(matrix, ScreenedTable(head)) if screens else None, eight_bits

    def _copy(self, matrix: PackedTensor, method: RoundedTable | ScreenedTable) -> VocabParallelEmbedding:
        copy = self._make()
        copy.quant_method = method
        copy.qweight.parts[None], copy.qweight.given[None] = method.written(matrix), matrix
        return copy

    def _renew(self) -> None:
        """In their places, which graphs hold."""
        self._updates = weight_updates()
        for head, copies in self._copies.items():
            for copy in filter(None, copies):
                matrix = copy.qweight.given[None] = _matrix(head)
                copy.qweight.parts[None].data.copy_(copy.quant_method.written(matrix).data)


def _matrix(head: VocabParallelEmbedding) -> PackedTensor:
    """This rank's rows as they were loaded."""
    if is_packed(head):
        return head.qweight.as_given()[0]
    tokens = head.shard_indices
    return plain(head.weight.data[: tokens.org_vocab_end_index - tokens.org_vocab_start_index])


def _kept(head: VocabParallelEmbedding) -> PackedTensor:
    """This rank's rows as the kernels read them."""
    return head.qweight.rows()[0] if is_packed(head) else _matrix(head)
