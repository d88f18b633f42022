"""What the checkpoint is worth: held-out loss, agreement of the heads, accept length, loops.

Accept length needs no draft loop. On text the backbone wrote itself, a draft chain started at position t sees
exactly the true tokens as long as it has been right so far, so one teacher-forced pass gives every head's
draft, and the simulated verify rounds follow the law of the real ones (with the KV of rejected rows recomputed).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.nano.generate import generate
from scripts.nano.model import BLOCK, NanoStep


def trim(tokens: Tensor, extra: int) -> int:
    """Longest T with T + extra tokens available and T a multiple of the attention block."""
    return (tokens.shape[1] - extra) // BLOCK * BLOCK


@torch.inference_mode()
def heldout_loss(model: NanoStep, rows: Tensor) -> float:
    """Mean negative log-likelihood in nats a token; rows [B, >= T + 1]."""
    t = trim(rows, 1)
    losses = []
    for part in rows.split(16):
        logits = model.logits(model.hidden(part[:, :t]))
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1 : t + 1].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


@torch.inference_mode()
def agreement(model: NanoStep, rows: Tensor) -> list[float]:
    """Share of positions of rows [B, >= T + 4] where head i chooses what the backbone chooses for the same token."""
    t, equal = trim(rows, 4), []
    for part in rows.split(16):
        hidden = model.hidden(part[:, :t])
        backbone = model.logits(hidden).argmax(-1)
        heads = [d.argmax(-1) for d in model.draft_logits(part, hidden)]
        equal.append([float((h[:, : t - 1 - i] == backbone[:, 1 + i :]).float().mean()) for i, h in enumerate(heads)])
    return torch.tensor(equal).mean(0).tolist()


@torch.inference_mode()
def chances(model: NanoStep, rows: Tensor, temperature: float) -> Tensor:
    """[3, B, T - 4]: probability that head i's draft for token t + 2 + i is accepted, given that the row (the
    backbone's own text, [B, >= T + 4]) goes on as it does.

    A greedy draft (temperature 0) has to equal the token. A draft drawn from q and verified against p by
    speculative sampling is accepted with min(1, q / p) of the token x that comes out: min(p, q)(x) / p(x)."""
    t, out = trim(rows, 4), []
    for part in rows.split(8):
        hidden = model.hidden(part[:, :t])
        verify, kept = model.logits(hidden), []
        for i, draft in enumerate(model.draft_logits(part, hidden)):
            token = part[:, 2 + i : t - 2 + i]
            draft, target = draft[:, : t - 4], verify[:, 1 + i : t - 3 + i]  # both name token t + 2 + i
            if temperature == 0:
                kept.append((draft.argmax(-1) == token).float())
                continue
            log_q, log_p = (
                (x / temperature).log_softmax(-1).gather(-1, token[..., None])[..., 0] for x in (draft, target)
            )
            kept.append((log_q - log_p).exp().clamp(max=1.0))
        out.append(torch.stack(kept))
    return torch.cat(out, dim=1)


def verify_rounds(accepted: list[list[bool]], start: int, end: int) -> list[int]:
    """Tokens of each verify round over positions start .. end - 1 of a row; accepted[i][t] tells whether head i's
    draft for token t + 2 + i is accepted. A round yields the accepted drafts plus the backbone's own token."""
    t, rounds = start - 1, []  # t: the last verified position; token t + 1 is already chosen
    while t + 1 + len(accepted) < end:
        count = 0
        while count < len(accepted) and accepted[count][t]:
            count += 1
        rounds.append(count + 1)
        t += count + 1
    return rounds


def repeated_ngrams(rows: list[list[int]], n: int = 8) -> float:
    """Share of n-grams that occurred earlier in the same row."""
    total = repeated = 0
    for row in rows:
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        total, repeated = total + len(grams), repeated + len(grams) - len(set(grams))
    return repeated / max(total, 1)


def all_rounds(chance: Tensor, spans: list[tuple[int, int]], seed: int) -> list[int]:
    """verify_rounds() of every row; chance [3, B, T], spans (start, end) by row. Coins are drawn once per draft."""
    accepted = torch.rand(chance.shape, generator=torch.Generator().manual_seed(seed)) < chance
    return [n for b, span in enumerate(spans) for n in verify_rounds(accepted[:, b].tolist(), *span)]


def speculation(model: NanoStep, prompts: list[list[int]], new: int, temperature: float, seed: int) -> dict:
    """Continues the prompts and simulates MTP-3 on the result as the worker does it: drafts are greedy at
    temperature 0, else drawn from the head's distribution and verified by speculative sampling. For sampled text
    also the measure of old reports: greedy drafts, accepted where they equal the sampled token."""
    longest = max(map(len, prompts))
    length = -(-(longest + new + 8) // BLOCK) * BLOCK + 4
    rows = generate(model, prompts, length, temperature, seed)
    spans = [(len(prompt), len(prompt) + new) for prompt in prompts]
    rounds = all_rounds(chances(model, rows, temperature), spans, seed)
    result = {
        "accept_length": sum(rounds) / len(rounds),
        "rounds_by_accepted_drafts": [rounds.count(i) for i in range(1, len(model.mtp) + 2)],
    }
    if temperature:
        greedy = all_rounds(chances(model, rows, 0.0), spans, seed)
        result["accept_length_of_greedy_drafts"] = sum(greedy) / len(greedy)
    written = [row[start:end] for row, (start, end) in zip(rows.tolist(), spans, strict=True)]
    return result | {"repeated_8gram_share": repeated_ngrams(written), "prompts": len(prompts), "new_tokens_each": new}
