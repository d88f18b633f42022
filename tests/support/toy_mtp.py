"""A toy target and toy MTP layers: hashes, so that one wrong token, hidden state or KV entry changes the drafts.

A target's hidden state at position t is a hash of the tokens up to t. An MTP row carries the hash of the tokens it has
read, and a digest of its own layer's KV over a window and of every layer's below. Drafts follow from both: right
about seven times in ten, and never by accident the same after a mistake. `Definition` computes them from scratch.
Letters: V vocabulary, S layers, T tokens.
"""

from functools import cache

import torch
from torch import Tensor

from sglang_step35.model.mtp_pass import LayerPass

VOCAB, EARLIER_KEYS = 13, 4
_WORD = 2**64 - 1


def mix(*parts: int) -> int:
    """A hash of integers, below 2**62."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ part) * 0xBF58476D1CE4E5B9 & _WORD
        state ^= state >> 29
    return state * 0x94D049BB133111EB % 2**64 >> 2


@cache
def fold(state: int, token: int) -> int:
    """The target's hidden state after one more token; 0 before the first."""
    return mix(1, state, token)


@cache
def _logits(noise: int, choice: int) -> tuple[float, ...]:
    values = [2.5 * mix(noise, token) / 2**62 for token in range(VOCAB)]
    values[choice] += 2.5
    return tuple(values)


def target_logits(state: int) -> Tensor:
    """[V] after a hidden state."""
    return torch.tensor(_logits(mix(6, state), mix(2, state) % VOCAB))


def layer_kv(layer: int, hidden: tuple[int, int], token: int) -> int:
    """What a layer writes for one row."""
    return mix(3, layer, *hidden, token)


def layer_row(layer: int, hidden: tuple[int, int], token: int, seen: list[int]) -> tuple[int, int]:
    """A layer's output for one row; seen: its KV of the window, the row's own last."""
    return fold(hidden[0], token), mix(4, layer, hidden[1], *seen)


def draft_logits(row: tuple[int, int]) -> Tensor:
    """[V] after a row: the target's choice for the tokens read, or another."""
    state, digest = row
    right = digest % 10 < 7
    return torch.tensor(_logits(mix(7, digest), mix(2, state) % VOCAB if right else mix(5, digest) % VOCAB))


class Definition:
    """What the MTP layers must compute for the tokens x_0 .. x_n, all recomputed, no cache."""

    def __init__(self, tokens: list[int]):
        self.tokens = list(tokens)
        self.states = [fold(0, self.tokens[0])]
        for token in self.tokens[1:]:
            self.states.append(fold(self.states[-1], token))
        self.row = cache(self._row)
        self.kv = cache(self._kv)

    def target(self, extra: list[int]) -> Tensor:
        """The target's logits [V] after x_0 .. x_n and `extra`."""
        state = self.states[-1]
        for token in extra:
            state = fold(state, token)
        return target_logits(state)

    def draft(self, count: int, pick) -> list[int]:
        """Drafts x_{n+1} ..; pick(layer, logits [V]) chooses one."""
        last, drafts = len(self.tokens) - 2, []
        for layer in range(count):
            drafts.append(pick(layer, draft_logits(self.row(layer, last))))
            self.tokens.append(drafts[-1])
        return drafts

    def _input(self, layer: int, position: int) -> tuple[int, int]:
        return self.row(layer - 1, position) if layer else (self.states[position], 0)

    def _kv(self, layer: int, position: int) -> int:
        return layer_kv(layer, self._input(layer, position), self.tokens[position + 1 + layer])

    def _row(self, layer: int, position: int) -> tuple[int, int]:
        seen = [self.kv(layer, t) for t in range(max(0, position - EARLIER_KEYS), position + 1)]
        return layer_row(layer, self._input(layer, position), self.tokens[position + 1 + layer], seen)


class ToyMTP:
    """The layers over a KV pool, as `draft.EagerPass` drives a model; what `plan` says is where rows belong."""

    def __init__(self, req_to_token: Tensor, num_layers: int):
        self.req_to_token = req_to_token
        self.pools: list[dict[int, int]] = [{} for _ in range(num_layers)]
        self.floors: dict[int, int] = {}  # per pool index, positions before it are evicted
        self.allocator = None  # SGLang's, where KV lies in sliding slots behind the full ones
        self.owners: list[int] = []
        self.rows = [0] * num_layers  # whose outputs each layer computed
        self.predicted = 0  # rows of logits

    def plan_rows(self, pool_indices: Tensor, row_counts: list[int], ends: list[int], slots: Tensor) -> None:
        """The attention backend's part: whose rows come."""
        self.owners = [b for b, count in zip(pool_indices.tolist(), row_counts, strict=True) for _ in range(count)]

    def start_pass(self, positions: Tensor, hidden: Tensor, last: Tensor, batch) -> LayerPass:
        return LayerPass(self, positions, hidden, last, batch)

    def forward_layer(self, layer: int, tokens: Tensor, positions: Tensor, hidden: Tensor, batch) -> Tensor:
        """Every row's KV is written before any is read; slot 0 takes what nobody may read."""
        self.write_kv(layer, tokens, positions, hidden, batch)
        self.rows[layer] += len(tokens)
        pool, slots = self.pools[layer], batch.out_cache_loc.tolist()
        inputs = [tuple(pair) for pair in hidden.tolist()]
        tokens, positions = tokens.tolist(), positions.tolist()
        out = []
        for owner, slot, pair, token, position in zip(self.owners, slots, inputs, tokens, positions, strict=True):
            first = max(0, position - EARLIER_KEYS)
            if slot and self.allocator is None:
                assert first >= self.floors.get(owner, 0), f"position {first} was evicted"
            seen = self._own(self.req_to_token[owner, first : position + 1])
            out.append(layer_row(layer, pair, token, [pool.get(at, 0) for at in seen]))
        return torch.tensor(out, dtype=torch.int64).view(-1, 2)

    def write_kv(self, layer: int, tokens: Tensor, positions: Tensor, hidden: Tensor, batch) -> None:
        slots = self._own(batch.out_cache_loc)
        for slot, pair, token in zip(slots, hidden.tolist(), tokens.tolist(), strict=True):
            self.pools[layer][slot] = layer_kv(layer, tuple(pair), token)

    def _own(self, slots: Tensor) -> list[int]:
        """The layers' own slots behind full ones."""
        return (slots if self.allocator is None else self.allocator.full_to_swa_index_mapping[slots]).tolist()

    def compute_logits(self, layer: int, rows: Tensor) -> Tensor:
        """[B, V]."""
        self.predicted += len(rows)
        logits = [draft_logits((state, digest))[None] for state, digest in rows.tolist()]
        return torch.cat([torch.empty(0, VOCAB), *logits])


class ToyTarget:
    """The target over a KV pool of hidden states."""

    def __init__(self, req_to_token: Tensor):
        self.req_to_token = req_to_token
        self.states: dict[int, int] = {}

    def forward(self, owner: int, first: int, tokens: list[int]) -> list[int]:
        """Hidden states of tokens at positions first .. of a request; writes the pool."""
        row = self.req_to_token[owner].tolist()
        state = self.states[row[first - 1]] if first else 0
        states = []
        for position, token in enumerate(tokens, first):
            state = self.states[row[position]] = fold(state, token)
            states.append(state)
        return states
