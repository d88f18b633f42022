"""One pass of the MTP layers over the same rows, a layer after the other.

Letters: T rows, B requests, H hidden size, V vocabulary.
"""

from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import Tensor


class LayerPass:
    """A layer at a time, by whatever way the model takes; `graphed_mtp.GraphedPass` is the same by graphs.

    hidden: [T, H], what the layer that ran last leaves to the next one.
    """

    def __init__(self, model, positions: Tensor, hidden: Tensor, last: Tensor, forward_batch: ForwardBatch):
        """model: a `Step3p5MTP`. positions: [T] int64. hidden: [T, H], the backbone's. last: [B], the rows that predict
        a draft."""
        self.model, self.positions, self.hidden, self.last = model, positions, hidden, last
        self.forward_batch = forward_batch

    def logits(self, depth: int, tokens: Tensor) -> Tensor:
        """Run a layer over tokens [T]; [B, V]."""
        self.forward(depth, tokens)
        return self.model.compute_logits(depth, self.hidden[self.last])

    def forward(self, depth: int, tokens: Tensor) -> None:
        """Run a layer for the next one alone."""
        self.hidden = self.model.forward_layer(depth, tokens, self.positions, self.hidden, self.forward_batch)

    def write_kv(self, depth: int, tokens: Tensor) -> None:
        """Of a layer that no other follows, only what later passes read."""
        self.model.write_kv(depth, tokens, self.positions, self.hidden, self.forward_batch)
