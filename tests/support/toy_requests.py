"""Requests, sampling settings and the plain decoding they are held to, for tests of the worker without a server."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from sglang_step35.speculative.draft_sampler import FIRST_DRAFT_STREAM
from sglang_step35.speculative.sampling import hashed_uniform
from tests.support.toy_mtp import VOCAB, Definition

NO_PENALTY = (0.0, 0.0, 1.0)
STOPS = [3, 7]


@dataclass(eq=False)
class ToyRequest:
    """What the worker reads of SGLang's Req, and the truth about it."""

    rid: str
    origin_input_ids: list[int]
    pool_idx: int
    penalty: tuple[float, float, float] = NO_PENALTY  # frequency, presence, repetition
    min_new_tokens: int = 0
    max_new_tokens: int = 1000
    limit: int | None = None  # drafts a round it allows
    temperature: float = 0.0
    seed: int = 0
    output_ids: list[int] = field(default_factory=list)
    filled: int = 0  # positions in the KV cache
    drafts: list[int] = field(default_factory=list)  # checked against the definition
    proposals: list[Tensor] = field(default_factory=list)  # distributions they were drawn from
    relay: tuple[Tensor, Tensor] | None = None  # topk_index [S] and the bonus token, as the scheduler relays them
    spec_verify_ct: int = 0
    histogram: Counter = field(default_factory=Counter)  # rounds by accepted drafts
    cached_tokens = cached_tokens_host = cached_tokens_storage = retraction_count = 0
    eos_token_ids = tuple(STOPS)
    tokenizer = None
    grammar = custom_logit_processor = None

    @property
    def kv(self):
        return SimpleNamespace(req_pool_idx=self.pool_idx)

    @property
    def sampling_params(self):
        frequency, presence, repetition = self.penalty
        return SimpleNamespace(
            frequency_penalty=frequency,
            presence_penalty=presence,
            repetition_penalty=repetition,
            min_new_tokens=self.min_new_tokens,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=None,
            top_k=-1 if self.temperature else 1,
            custom_params=None if self.limit is None else {"speculative_depth": self.limit},
        )

    def update_spec_correct_drafts_histogram(self, num_correct_drafts: int) -> None:
        self.histogram[num_correct_drafts] += 1

    @property
    def tokens(self) -> list[int]:
        return self.origin_input_ids + self.output_ids

    full_untruncated_fill_ids = tokens

    @property
    def prefilled(self) -> bool:
        """Whether everything but the bonus token is in the KV cache."""
        return self.relay is not None

    def adjust(self, logits: Tensor, output: list[int]) -> Tensor:
        """One row of logits [V], penalised for `output` as plain decoding does."""
        frequency, presence, repetition = self.penalty
        row = logits.clone()
        for token in set(output):
            row[token] -= frequency * output.count(token) + presence
            row[token] = row[token] * repetition if row[token] < 0 else row[token] / repetition
        if len(output) < self.min_new_tokens:
            row[STOPS] = -torch.inf
        return row

    def first_token(self) -> int:
        """What the target's own sampler says after a prefill."""
        return int(self.adjust(Definition(self.tokens).target([]), self.output_ids).argmax())

    def expected_drafts(self, count: int) -> tuple[list[int], list[Tensor]]:
        """Drafts after the present tokens, from scratch, and the distributions of a sampling request."""
        proposals: list[Tensor] = []

        def pick(layer: int, logits: Tensor) -> int:
            if not self.temperature:
                return int(logits.argmax())
            proposals.append((logits / self.temperature).softmax(-1))
            return sample(proposals[-1], self.coin(len(self.tokens) - 1, FIRST_DRAFT_STREAM + layer))

        return Definition(self.tokens).draft(count, pick), proposals

    def expected_round(self) -> list[int]:
        """Tokens the next round adds, from the present drafts."""
        definition = Definition(self.tokens)
        return self.judged(self.drafts, lambda i: definition.target(self.drafts[:i]))

    def judged(self, drafts: list[int], target: Callable[[int], Tensor]) -> list[int]:
        """What is kept of these drafts and the token behind them; target(i): logits [V] behind the first i."""
        rows = [self.adjust(target(i), self.output_ids + drafts[:i]) for i in range(len(drafts) + 1)]
        if self.temperature:
            return self._sampled([(row / self.temperature).softmax(-1) for row in rows], drafts)
        wanted = [int(row.argmax()) for row in rows]
        kept = next((i for i, draft in enumerate(drafts) if draft != wanted[i]), len(drafts))
        return wanted[: kept + 1]

    def _sampled(self, p: list[Tensor], drafts: list[int]) -> list[int]:
        """Block verification as Sun et al. 2024 write it (algorithm 2), with the coins of this request's seed."""
        start, q, chances = len(self.tokens) - 1, self.proposals, [1.0]
        for i, draft in enumerate(drafts):
            chances.append(min(chances[-1] * float(p[i][draft]) / float(q[i][draft]), 1.0))
        left = [(w * p[i] - q[i]).clamp(min=0) for i, w in enumerate(chances[:-1])]
        kept = 0
        for i in range(1, len(drafts) + 1):
            accepted = chances[i]
            if i < len(drafts) and accepted < 1:
                accepted = float(left[i].sum()) / (float(left[i].sum()) + 1 - accepted)
            if self.coin(start, i) < accepted:
                kept = i
        return [*drafts[:kept], sample(left[kept] if kept < len(drafts) else p[kept], self.coin(start, 0))]

    def coin(self, position: int, stream: int) -> float:
        """The uniform number of this request's seed."""
        return hashed_uniform(torch.tensor(self.seed), torch.tensor(position), stream).item()


def sample(weights: Tensor, coin: float) -> int:
    """The first token whose cumulated weight exceeds the coin's share."""
    cumulated = weights.double().cumsum(-1)
    return int((cumulated > coin * cumulated[-1]).nonzero()[0])


def sure(token: int) -> Tensor:
    """The distribution [V] of a token that was not drawn."""
    return torch.eye(VOCAB)[token]


def sampling_info(requests, **changes) -> SimpleNamespace:
    """What the worker reads of SGLang's SamplingBatchInfo."""
    temperatures = torch.tensor([[r.temperature or 1.0] for r in requests])
    fields = dict(
        is_all_greedy=not any(r.temperature for r in requests),
        is_any_greedy=not all(r.temperature for r in requests),
        temperatures=temperatures.view(-1, 1),
        top_ks=torch.tensor([1 << 30 if r.temperature else 1 for r in requests], dtype=torch.int32),
        top_ps=torch.ones(len(requests)),
        min_ps=torch.zeros(len(requests)),
        need_top_k_sampling=False,
        need_top_p_sampling=False,
        need_min_p_sampling=False,
        sampling_seed=torch.tensor([r.seed for r in requests], dtype=torch.int64),
        has_custom_logit_processor=False,
        logit_bias=None,
        vocab_size=VOCAB,
        grammar_mask=None,
    )
    return SimpleNamespace(**{**fields, **changes})
