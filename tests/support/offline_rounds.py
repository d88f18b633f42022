"""Rounds of a loop that recomputes everything, from the reference's MTP layers and the brute-force look-up rule."""

from collections import Counter

import torch

from tests.support.nano_model import reference
from tests.support.plain_lookup import continuation

STEPS = 3


@torch.inference_mode()
def offline_rounds(ids: list[int], output: list[int], count: int, look_ups: int = 0) -> Counter[int]:
    """Rounds by accepted drafts, for `count` greedy tokens of nano; look_ups: tokens looked up after each whole chain.

    A chain that has been right so far has seen the true tokens, so one teacher-forced pass over the output, which goes
    STEPS + look_ups tokens on, gives every draft such a loop would make.
    """
    tokens, end = ids + output, len(ids) + count
    rows = reference().mtp_logits([*tokens, *[0] * STEPS])
    drafts = [logits.argmax(-1).tolist() for logits in rows]
    rounds: Counter[int] = Counter()
    known = len(ids) + 1
    while known < end:
        # Layer i's draft from row known - 2, which has read token known - 1, is for known + i.
        chain = [drafts[i][known - 2] for i in range(STEPS)]
        if look_ups and chain == tokens[known : known + STEPS]:  # else what follows is not accepted anyway
            chain += continuation(tokens[:known], chain, look_ups)
        matches = 0
        while matches < len(chain) and chain[matches] == tokens[known + matches]:
            matches += 1
        rounds[matches] += 1
        known += matches + 1
    return rounds
