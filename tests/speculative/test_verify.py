"""The verify step on given logits against a loop that processes one token at a time, as plain decoding would."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_step35.speculative import device, verify
from sglang_step35.speculative.acceptance import NO_DRAFT
from sglang_step35.speculative.state import OutputCounts
from tests.support.toy_mtp import VOCAB
from tests.support.toy_requests import STOPS, ToyRequest, sampling_info

WIDTH, PROMPT = 4, 5


class GivenTarget:
    """A target worker that answers with these logits [B * N, V]."""

    def __init__(self, logits):
        self.hidden = torch.randn(len(logits), 2)
        self.output = SimpleNamespace(next_token_logits=logits.clone(), hidden_states=self.hidden)

    def forward_batch_generation(self, batch, forward_batch, is_verify):
        assert batch is None and is_verify and forward_batch.input_ids.min() >= 0
        return GenerationBatchResult(logits_output=self.output)


class Table:
    """Logits of a first-order model, so that a loop can ask for any chain; drafts right about half the time."""

    def __init__(self, seed, size):
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn(size, VOCAB, VOCAB, generator=self.generator)
        self.proposals = torch.randn(size, WIDTH - 1, VOCAB, generator=self.generator).softmax(-1)

    def chain(self, b, start, count):
        """Drafts after a token: the likeliest, or any."""
        chain = [start]
        for coin in torch.rand(count, generator=self.generator).tolist():
            any_token = int(torch.randint(VOCAB, (), generator=self.generator))
            chain.append(int(self.logits[b, chain[-1]].argmax()) if coin < 0.6 else any_token)
        return chain


def requests_of(count, **options):
    """Requests that have put out 3 tokens, the last of which is the bonus."""
    options = {name: value if isinstance(value, list) else [value] * count for name, value in options.items()}
    return [
        ToyRequest(
            rid=f"r{b}",
            origin_input_ids=[1] * PROMPT,
            pool_idx=count - b,
            output_ids=[b % VOCAB, 4, (b + 2) % VOCAB],
            **{name: values[b] for name, values in options.items()},
        )
        for b in range(count)
    ]


@pytest.fixture(autouse=True)
def portable(monkeypatch):
    def prepare(spec_info, pool, batch, target_worker):
        batch.input_ids, batch.forward_mode = spec_info.draft_token, ForwardMode.TARGET_VERIFY
        return batch, False

    monkeypatch.setattr(verify, "eagle_prepare_for_verify", prepare)
    monkeypatch.setattr(device, "current_platform", SimpleNamespace(is_out_of_tree=lambda: True))


def run(requests, chains, table, sampled=False, grammar=False, barrier=None, logprob=False, **info):
    """Verify the chains; the outcome and the batch."""
    padded = torch.tensor([chain + [NO_DRAFT] * (WIDTH - len(chain)) for chain in chains])
    logits = table.logits[torch.arange(len(chains))[:, None], padded.clamp(min=0)].flatten(0, 1)
    lengths = torch.tensor([len(r.tokens) - 1 for r in requests])
    batch = SimpleNamespace(
        reqs=requests,
        seq_lens=lengths,
        sampling_info=sampling_info(requests, **info),
        has_grammar=grammar,
        return_logprob=logprob,
        top_logprobs_nums=None,
        token_ids_logprobs=None,
    )
    target = GivenTarget(logits)
    counts = OutputCounts(VOCAB, "cpu")
    proposal = table.proposals if sampled else None
    outcome = verify.TargetVerifier(target, None, counts).run(batch, padded, proposal, barrier)
    assert outcome.hidden is target.hidden
    return outcome, batch


def one_by_one(request, chain, logits, change=lambda row, output: row):
    """Tokens a round adds: greedy, each from one adjusted row; `change` comes first."""
    added, last = [], chain[0]
    for draft in [*chain[1:], None]:
        row = request.adjust(change(logits[last].clone(), request.output_ids + added), request.output_ids + added)
        last = int(row.argmax())
        added.append(last)
        if last != draft:
            return added
    raise AssertionError("the last step has no draft")


def check(outcome, expected):
    assert [row[:n].tolist() for row, n in zip(outcome.tokens, outcome.accept_lens)] == expected


def chains_of(table, requests, drafts=WIDTH - 1):
    return [table.chain(b, r.tokens[-1], drafts) for b, r in enumerate(requests)]


def test_greedy_windows():
    requests, table = requests_of(40), Table(0, 40)
    chains = chains_of(table, requests)
    outcome, _ = run(requests, chains, table)
    check(outcome, [one_by_one(r, c, t) for r, c, t in zip(requests, chains, table.logits)])
    assert set(outcome.accept_lens.tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_columns_without_a_draft_are_never_accepted(drafts):
    """Token 0, which stands in for them, is what the target wants there."""
    requests, table = requests_of(20), Table(1, 20)
    table.logits[:, :, 0] += 3
    chains = chains_of(table, requests, drafts)
    outcome, _ = run(requests, chains, table)
    check(outcome, [one_by_one(r, c, t) for r, c, t in zip(requests, chains, table.logits)])
    assert outcome.accept_lens.max() == drafts + 1


@pytest.mark.parametrize("penalty", [(2.0, 0.0, 1.0), (0.0, 2.5, 1.0), (0.5, 0.5, 2.0)])
def test_penalties_count_the_output_and_the_drafts_before(penalty):
    none = (0.0, 0.0, 1.0)
    requests, table = requests_of(40, penalty=[penalty, none] * 20), Table(2, 40)
    table.logits += 3 * torch.eye(VOCAB)  # tokens like to repeat
    chains = chains_of(table, requests)
    outcome, _ = run(requests, chains, table)
    check(outcome, [one_by_one(r, c, t) for r, c, t in zip(requests, chains, table.logits)])


@pytest.mark.parametrize("minimum", [0, 3, 4, 5, 6, 7, 9])
def test_stop_tokens_are_forbidden_up_to_the_minimum_length(minimum):
    requests, table = requests_of(40, min_new_tokens=[minimum, 0] * 20), Table(3, 40)
    table.logits[:, :, STOPS] += 2
    chains = chains_of(table, requests)
    outcome, _ = run(requests, chains, table)
    check(outcome, [one_by_one(r, c, t) for r, c, t in zip(requests, chains, table.logits)])


def test_all_ids_that_stop_a_request_count_for_its_minimum_length():
    request = ToyRequest(rid="r", origin_input_ids=[1], pool_idx=0)
    params = SimpleNamespace(stop_token_ids=[5])
    tokenizer = SimpleNamespace(additional_stop_token_ids=[9], eos_token_id=None)
    found = verify._stop_tokens(
        SimpleNamespace(sampling_params=params, eos_token_ids=request.eos_token_ids, tokenizer=tokenizer)
    )
    assert found == [3, 5, 7, 9]


def test_logit_bias_is_added_to_every_row_of_its_request():
    requests, table = requests_of(40), Table(4, 40)
    bias = 3 * torch.randn(40, VOCAB, generator=table.generator)
    chains = chains_of(table, requests)
    outcome, _ = run(requests, chains, table, logit_bias=bias)
    biased = table.logits + bias[:, None]
    check(outcome, [one_by_one(r, c, t) for r, c, t in zip(requests, chains, biased)])


def test_a_custom_processor_sees_every_row_of_its_requests_before_the_penalties(monkeypatch):
    requests, table = requests_of(12, penalty=(0.5, 0.5, 1.3)), Table(5, 12)
    seen = []

    def processor(logits, info, num_tokens_in_batch):
        seen.append((num_tokens_in_batch, logits.clone()))
        logits[::2] *= -1

    monkeypatch.setattr(verify, "apply_custom_logit_processor", processor)
    chains = chains_of(table, requests)
    outcome, _ = run(requests, chains, table, has_custom_logit_processor=True)
    expected = []
    for request, chain, logits in zip(requests, chains, table.logits):
        signs = iter([-1, 1, -1, 1])
        expected.append(one_by_one(request, chain, logits, lambda row, output, signs=signs: row * next(signs)))
    check(outcome, expected)
    assert len(seen) == 1 and seen[0][0] == WIDTH
    rows = [table.logits[b, token] for b, chain in enumerate(chains) for token in chain]
    torch.testing.assert_close(seen[0][1], torch.stack(rows))


class NoRepeats:
    """A grammar over the output: never the same token twice running; built like SGLang's masks over a tree."""

    def __init__(self, vocab_mask):
        self.vocab_mask = vocab_mask

    def apply(self, logits):
        logits[self.vocab_mask] = -torch.inf


def test_a_grammar_masks_each_row_by_the_drafts_before_it_once_the_barrier_has_passed(monkeypatch):
    requests, table, events = requests_of(20), Table(6, 20), []
    chains = chains_of(table, requests, 2)

    def mask(*, reqs, tree, sampling_info, device, barrier):
        barrier()
        _, _, ids = tree.resolve()
        events.append("mask")
        return NoRepeats(torch.zeros(ids.numel(), VOCAB, dtype=torch.bool).scatter(1, ids.view(-1, 1), True))

    monkeypatch.setattr(verify, "build_grammar_vocab_mask", mask)
    table.logits += 4 * torch.eye(VOCAB)
    outcome, _ = run(requests, chains, table, grammar=True, barrier=lambda: events.append("barrier"))
    banned = torch.eye(VOCAB, dtype=torch.bool)
    masked = table.logits.masked_fill(banned, -torch.inf)
    check(outcome, [one_by_one(r, c, t) for r, c, t in zip(requests, chains, masked)])
    assert events == ["barrier", "mask"]


@pytest.mark.parametrize("penalty", [(0.0, 0.0, 1.0), (0.4, 0.2, 1.3)])
def test_seeded_sampling_keeps_and_replaces_drafts_as_the_rule_says(penalty):
    """Greedy requests among them; each request's draws follow from its seed and position."""
    temperature = [0.7, 1.4, 0.0, 1.0] * 15
    requests = requests_of(60, temperature=temperature, seed=list(range(60)), penalty=penalty)
    table = Table(7, 60)
    chains = chains_of(table, requests)
    outcome, _ = run(requests, chains, table, sampled=True)
    check(outcome, [sampled(r, c, *t) for r, c, *t in zip(requests, chains, table.logits, table.proposals)])
    assert set(outcome.accept_lens.tolist()) == {1, 2, 3, 4}


def sampled(request, chain, logits, proposals):
    request.proposals = list(proposals)
    return request.judged(chain[1:], lambda i: logits[chain[i]])


def test_the_scheduler_gets_accepted_tokens_their_indices_and_the_new_lengths():
    requests, table = requests_of(8), Table(8, 8)
    chains = chains_of(table, requests)
    outcome, batch = run(requests, chains, table, logprob=True)
    result, lengths = outcome.result, outcome.accept_lens.tolist()
    assert result.next_token_ids.dtype == result.accept_lens.dtype == result.accept_index.dtype == torch.int32
    assert result.next_token_ids.shape == (8 * WIDTH,) and result.speculative_num_draft_tokens == WIDTH
    assert result.accept_lens.tolist() == lengths
    assert result.new_seq_lens.tolist() == [PROMPT + 2 + n for n in lengths]
    assert result.extra_keep_alive_refs == [batch] and not result.can_run_cuda_graph
    for b, n in enumerate(lengths):
        window = range(b * WIDTH, b * WIDTH + n)
        assert result.accept_index[b].tolist() == [*window, *[-1] * (WIDTH - n)]
        assert result.next_token_ids[list(window)].tolist() == outcome.tokens[b, :n].tolist()
        rows = torch.stack([table.logits[b, token] for token in chains[b][:n]]).log_softmax(-1)
        wanted = rows.gather(1, outcome.tokens[b, :n, None]).squeeze(1)
        torch.testing.assert_close(result.logits_output.next_token_logprobs[b, :n], wanted)
