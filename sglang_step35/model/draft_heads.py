"""Heads in 8 bits for drafts alone, beside those of more that verification reads.

Every draft reads a head, as many bytes as an MTP layer and more, and those of the vocabulary stay in 16 bits in most
quantised checkpoints. A draft may come from any distribution, verification corrects for it (Leviathan et al. 2023), and
the layers' KV does not depend on it. What it costs is a draft in a hundred that another token would have been.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import nn

from sglang_step35.hicache.identity import weight_updates
from sglang_step35.model.product import LARGE, is_packed
from sglang_step35.packed.ggml import plain
from sglang_step35.packed.prepare import can_round, rounded
from sglang_step35.packed.tensor import PackedTensor


class DraftHeads:
    """The copies by the heads they are of, which this process may load anew."""

    def __init__(self, make: Callable[[], VocabParallelEmbedding]):
        """make: a head of this rank's whose rows stay packed, without any yet."""
        self._make = make
        self._copies: WeakKeyDictionary[nn.Module, VocabParallelEmbedding | None] = WeakKeyDictionary()
        self._updates = weight_updates()

    def of(self, head: VocabParallelEmbedding) -> VocabParallelEmbedding:
        """The copy, or the head itself where it is small or has no more than 8 bits, or memory is short."""
        if self._updates != weight_updates():
            self._renew()
        if head not in self._copies:
            self._copies[head] = self._copy(head)
        return self._copies[head] or head

    def _copy(self, head: VocabParallelEmbedding) -> VocabParallelEmbedding | None:
        matrix = _matrix(head)
        rows, columns = matrix.shape
        if rows * columns < LARGE or not can_round(matrix):
            return None
        copy = self._make()
        copy.qweight.parts[None], copy.qweight.given[None] = rounded(matrix), matrix
        return copy

    def _renew(self) -> None:
        """In their places, which graphs hold."""
        self._updates = weight_updates()
        for head, copy in self._copies.items():
            if copy is not None:
                matrix = copy.qweight.given[None] = _matrix(head)
                copy.qweight.parts[None].data.copy_(rounded(matrix).data)


def _matrix(head: VocabParallelEmbedding) -> PackedTensor:
    """This rank's rows as they were loaded."""
    if is_packed(head):
        return head.qweight.as_given()[0]
    tokens = head.shard_indices
    return plain(head.weight.data[: tokens.org_vocab_end_index - tokens.org_vocab_start_index])
