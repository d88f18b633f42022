"""What the truncated checkpoint says, by construction: every token has one successor, and each MTP layer knows it for
a given share of the tokens. The offline loop over this table is the reference for a server's accept lengths.

Letters: V vocabulary, S MTP layers.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHARES = (0.85, 0.75, 0.65)  # of tokens after which layer i drafts the successor


@dataclass(frozen=True)
class Echo:
    """successor: [V] int64. hits: [S, V] bool, whether layer i's draft after token x is x's successor.

    spoken: the ordinary tokens of the tokenizer, one cycle of `successor`. Of the rest, the tokenizer's special
    tokens lead into the cycle and tokens no tokenizer has into themselves; the last of these is the wrong draft.
    """

    successor: Tensor
    hits: Tensor
    spoken: Tensor

    @property
    def trap(self) -> int:
        """What a layer drafts where it does not know the successor."""
        return len(self.successor) - 1

    def text(self, last: int, count: int) -> list[int]:
        """The greedy continuation of a prompt that ends with token `last`."""
        tokens = []
        for _ in range(count):
            last = int(self.successor[last])
            tokens.append(last)
        return tokens

    def rounds(self, tokens: list[int], count: int) -> Counter:
        """Rounds by accepted drafts until `count` tokens are out, the first of which the prefill gives.

        tokens: the continuation, at least `count` + S long, since the last round may draft past the end.
        """
        steps, found, known = len(self.hits), Counter(), 1
        while known < count:
            matches = 0
            # Layer i reads the newest token or the draft before its own, and drafts that one's successor.
            while matches < steps and self.hits[matches, tokens[known - 1 + matches]]:
                matches += 1
            found[matches] += 1
            known += matches + 1
        return found

    def accept_length(self) -> float:
        """Tokens a round commits, over one turn of the cycle."""
        tokens = self.text(int(self.spoken[0]), len(self.spoken) + len(self.hits))
        rounds = self.rounds(tokens, len(self.spoken))
        return 1 + sum(accepted * count for accepted, count in rounds.items()) / rounds.total()


def make_echo(vocab_size: int, tokenizer: Path, shares: tuple[float, ...] = SHARES, seed: int = 0) -> Echo:
    """tokenizer: a tokenizer.json whose ids are 0 .. n - 1 with n below vocab_size."""
    parts = json.loads(tokenizer.read_text())
    special = sorted({token["id"] for token in parts["added_tokens"]})
    known = max([*special, *parts["model"]["vocab"].values()]) + 1
    if known >= vocab_size:
        raise ValueError(f"{tokenizer}: {known} tokens, expected fewer than the vocabulary's {vocab_size}")
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor(sorted(set(range(known)) - set(special)))
    cycle = ordinary[torch.randperm(len(ordinary), generator=generator)]
    successor = torch.arange(vocab_size)
    successor[cycle] = cycle.roll(-1)
    successor[special] = cycle[torch.tensor(special) % len(cycle)]
    hits = torch.ones(len(shares), vocab_size, dtype=torch.bool)
    for layer, share in enumerate(shares):
        order = cycle[torch.randperm(len(cycle), generator=generator)]
        hits[layer, order[round(share * len(cycle)) :]] = False
    return Echo(successor, hits, cycle)
