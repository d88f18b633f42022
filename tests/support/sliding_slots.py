"""SGLang's sliding slots for the host of `worker_host.py`: given with a position's KV, taken back behind the window."""

import random
from types import SimpleNamespace

import torch


class SlidingSlots:
    """SGLang's allocator of sliding slots, which stand behind full ones; pages of one slot.

    cached: full slots that the prefix cache holds; it gives their sliding ones back when asked, as SGLang's does.
    """

    page_size = 1

    def __init__(self, full: int, sliding: int):
        self.size_swa = sliding
        self.full_to_swa_index_mapping = torch.zeros(full + 2, dtype=torch.int64)
        self.free = list(range(1, sliding + 1))
        self.swa_attn_allocator = SimpleNamespace(alloc=self.alloc, free=self.give_back)
        self.cached: set[int] = set()
        self.asked = 0  # how often the cache had to make room

    def swa_available_size(self) -> int:
        return len(self.free)

    def alloc(self, count: int) -> torch.Tensor | None:
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        return torch.tensor(taken, dtype=torch.int64)

    def give_back(self, slots: torch.Tensor) -> None:
        self.free = slots.tolist() + self.free  # the next in need gets them
        assert len(set(self.free)) == len(self.free) and 0 not in self.free, "given back twice"

    def set_full_to_swa_mapping(self, full: torch.Tensor, sliding: torch.Tensor) -> None:
        assert not self.full_to_swa_index_mapping[full].any(), "these have some"
        self.full_to_swa_index_mapping[full] = sliding

    def clear_full_to_swa_mapping(self, full: torch.Tensor) -> None:
        self.full_to_swa_index_mapping[full] = 0

    def map(self, full: torch.Tensor) -> None:
        """Sliding slots for those that have none."""
        new = full[self.full_to_swa_index_mapping[full] == 0]
        if len(new) > len(self.free):
            self.evict_for_alloc(SimpleNamespace(swa_num_tokens=len(new) - len(self.free)))
        self.set_full_to_swa_mapping(new, self.alloc(len(new)))

    def unmap(self, full: torch.Tensor) -> None:
        """Take back what these have, but not from the prefix cache."""
        mine = torch.tensor([slot for slot in full.tolist() if slot not in self.cached], dtype=torch.int64)
        sliding = self.full_to_swa_index_mapping[mine]
        self.give_back(sliding[sliding > 0])
        self.clear_full_to_swa_mapping(mine)

    def evict_for_alloc(self, params) -> None:
        """SGLang's tree: cached rows lose their sliding slots, those of running requests' prefixes among them."""
        self.asked += 1
        held = [slot for slot in self.cached if self.full_to_swa_index_mapping[slot]]
        for slot in random.Random(self.asked).sample(held, min(len(held), params.swa_num_tokens)):
            self.cached.discard(slot)
            self.unmap(torch.tensor([slot]))
            self.cached.add(slot)
