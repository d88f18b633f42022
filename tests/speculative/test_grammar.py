"""Drafts under grammars of both backends, on nano's tokenizer, against regular expressions matched by `regex`."""

import random
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.constrained.llguidance_backend import GuidanceBackend
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from transformers import AutoTokenizer

from sglang_step35.assets import NANO
from sglang_step35.speculative.draft_sampler import DraftSampler
from sglang_step35.speculative.grammar import DraftGrammars, cut_forbidden, drafting_what_is_allowed
from tests.support.patterns import EOS, VOCAB, allowed
from tests.support.toy_requests import ToyRequest, sampling_info

PATTERNS = ["[a-z]{3,8}=[0-9]{2,12};", "(yes|no|maybe)", '\\{"a": (true|false|[0-9]{1,3})\\}', "x?"]
THINK_END = 40


@cache
def backend(name):
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    if name == "xgrammar":
        return XGrammarGrammarBackend(tokenizer, VOCAB, EOS)
    return GuidanceBackend(tokenizer, n_vocab=VOCAB, eos_token_ids=EOS)


@pytest.fixture(params=["xgrammar", "llguidance"])
def grammar_of(request):
    return backend(request.param).dispatch_regex


def request_with(grammar):
    return SimpleNamespace(grammar=grammar)


def left(grammars, rows):
    """What each row's logits allow, [rows, V] bool."""
    return grammars.mask(torch.zeros(rows, VOCAB)) == 0


def walk(pattern, chance, length):
    """Tokens that a request under the pattern might draft, the last of which may be forbidden or end the text."""
    tokens = []
    while len(tokens) < length and not (tokens and tokens[-1] in EOS):
        choices = allowed(pattern, tuple(tokens)).nonzero().flatten().tolist()
        tokens.append(chance.choice(choices))
    if tokens[-1] not in EOS and chance.random() < 0.3:
        tokens[-1] = chance.randrange(VOCAB)
    return tokens


def fresh(grammar_of, pattern, tokens):
    """What a grammar that has read these tokens itself allows: [V] bool."""
    grammar = grammar_of(pattern)
    for token in tokens:
        grammar.accept_token(token)
    mask = grammar.allocate_vocab_mask(VOCAB, 1, "cpu")
    grammar.fill_vocab_mask(mask, 0)
    return ((mask[0, :, None] >> torch.arange(32)) & 1).bool().flatten()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_layer_may_draft_what_can_follow_and_the_grammar_comes_back(grammar_of, pattern):
    """llguidance allows no token of forced text but those that its tokenizer makes of it."""
    grammar, chance = grammar_of(pattern), random.Random(pattern)
    exact = type(grammar).__module__ == XGrammarGrammarBackend.__module__
    for _ in range(6):
        tokens = walk(pattern, chance, 6)
        grammars = DraftGrammars([request_with(None), request_with(grammar)], VOCAB)
        for count, token in enumerate(tokens):
            expected = allowed(pattern, tuple(tokens[:count]))
            found = left(grammars, 2)
            assert found[0].all() and torch.equal(found[1], fresh(grammar_of, pattern, tokens[:count]))
            assert torch.equal(found[1], expected) if exact else not (found[1] & ~expected).any()
            taken = grammars.take(1, [token])
            assert taken == int(found[1, token])
            if not taken or token in EOS:
                break
        grammars.close()
    assert torch.equal(left(DraftGrammars([request_with(grammar)], VOCAB), 1)[0], fresh(grammar_of, pattern, []))


def test_behind_a_forbidden_token_everything_is_allowed(grammar_of):
    start = encode("yes")[:1]
    for tokens in ([500, 7], [*start, 500, 7]):
        grammars = DraftGrammars([request_with(grammar_of("(yes|no)"))], VOCAB)
        assert grammars.take(0, tokens) == len(tokens) - 2
        assert left(grammars, 1).all() and grammars.take(0, [7, 8]) == 2
        grammars.close()


def test_the_end_of_a_text_is_followed_by_anything():
    grammars = DraftGrammars([request_with(backend("xgrammar").dispatch_regex("(yes|no)"))], VOCAB)
    assert grammars.take(0, [*encode("no"), EOS[0], 7]) == len(encode("no")) + 2
    assert left(grammars, 1).all()
    grammars.close()


def encode(text):
    return AutoTokenizer.from_pretrained(NANO).encode(text, add_special_tokens=False)


def test_a_grammar_that_allows_nothing_forbids_no_draft():
    class Nothing:
        def allocate_vocab_mask(self, vocab_size, batch_size, device):
            return torch.full((batch_size, vocab_size // 32), -1, dtype=torch.int32)

        def is_terminated(self):
            return False

        def fill_vocab_mask(self, mask, row):
            mask[row] = 0

    grammars = DraftGrammars([request_with(Nothing())], VOCAB)
    assert left(grammars, 1).all() and grammars.take(0, [5, 6]) == 2
    grammars.close()


def test_reasoning_is_free_up_to_its_end(grammar_of):
    pattern = PATTERNS[0]
    reasoner = ReasonerGrammarObject(grammar_of(pattern), [THINK_END])
    reasoner.maybe_init_reasoning(True)
    word = encode("abc")
    for _ in range(2):
        grammars = DraftGrammars([request_with(reasoner)], VOCAB)
        assert grammars.take(0, [900, 901]) == 2 and left(grammars, 1).all()
        assert grammars.take(0, [THINK_END]) == 1
        assert torch.equal(left(grammars, 1)[0], allowed(pattern, ()))
        assert grammars.take(0, word) == len(word)
        assert torch.equal(left(grammars, 1)[0], allowed(pattern, tuple(word)))
        grammars.close()


def test_what_was_looked_up_ends_before_the_first_forbidden_token(grammar_of):
    pattern = PATTERNS[0]
    good, bad = encode("abc=12345"), encode("ABC")
    batch = SimpleNamespace(
        has_grammar=True,
        reqs=[request_with(g) for g in (grammar_of(pattern), None, grammar_of(pattern), grammar_of(pattern))],
        sampling_info=SimpleNamespace(vocab_size=VOCAB),
    )
    chains = [good[:2], good[:2], [*good[:1], *bad], good[:1]]
    found = [good[2:] + bad + good, bad, good, []]
    assert cut_forbidden(batch, chains, found) == [good[2:], bad, [], []]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pass_under_grammars_drafts_and_notes_the_masked_distribution(grammar_of, temperature):
    """The newest tokens lead there; requests without a grammar draft as ever."""
    pattern, steps = PATTERNS[0], 3
    newest = encode("ab")
    toys = [ToyRequest(f"r{b}", [1], b, temperature=temperature, seed=b) for b in range(2)]
    reqs = [request_with(grammar_of(pattern)), request_with(None)]
    info = sampling_info(toys, vocab_size=VOCAB)
    batch = SimpleNamespace(has_grammar=True, reqs=reqs, sampling_info=info)
    tokens = torch.tensor([[*newest, 500], [600] * (len(newest) + 1)])
    layers = 3 * torch.randn(steps, 2, VOCAB, generator=torch.Generator().manual_seed(0))
    plain = DraftSampler(info, torch.tensor([5, 5]), num_steps=steps)
    sampler = DraftSampler(info, torch.tensor([5, 5]), num_steps=steps)
    with drafting_what_is_allowed(batch, sampler, tokens, torch.tensor([len(newest), 2])):
        for layer in range(steps):
            sampler(layer, layers[layer].clone())
            plain(layer, layers[layer].clone())
    output = list(newest)
    for layer, drafts in enumerate(sampler.drafts):
        masked = layers[layer, 0].masked_fill(~allowed(pattern, tuple(output)), -torch.inf)
        if temperature:
            torch.testing.assert_close(sampler.probs[layer][0], masked.softmax(-1))
            assert masked[drafts[0]] > -torch.inf
        else:
            assert int(drafts[0]) == int(masked.argmax())
        assert int(drafts[1]) == int(plain.drafts[layer][1])
        output.append(int(drafts[0]))
    assert [r.grammar and r.grammar.is_terminated() for r in reqs] == [False, None]
