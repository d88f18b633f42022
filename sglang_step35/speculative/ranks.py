"""What tensor-parallel ranks must agree on: rank 0's word counts.

All ranks run the same collectives in the same order, so a token or a number of layers that differs between two of them
hangs both. Clocks differ always, samples where two GPUs round differently (SGLang's own verifier broadcasts for that,
speculative/eagle_utils.py). Greedy choices come from gathered logits, which are the same bits everywhere.
"""

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """group: SGLang's coordinator of this rank's tensor-parallel group; None for a rank alone."""

    group: object | None = None

    @property
    def alone(self) -> bool:
        return self.group is None or self.group.world_size == 1

    def same(self, values: Tensor) -> Tensor:
        """Rank 0's values, in place and in the order of the device's stream."""
        return values if self.alone else self.group.broadcast(values, src=0)

    def same_number(self, value: float) -> float:
        """Rank 0's number, exchanged between the hosts: no stream is waited for."""
        if self.alone:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(shared, src=self.group.ranks[0], group=self.group.cpu_group)
        return shared.item()


ALONE = Ranks()
