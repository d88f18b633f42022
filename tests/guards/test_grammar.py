"""grammar.py and rules.py: guards in SGLang's hands, against the plain loop of `tests/support/plain_guards.py`."""

import random
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.speculative.spec_utils import generate_token_bitmask

from sglang_step35.guards import mask
from sglang_step35.guards.grammar import GuardedGrammar
from sglang_step35.guards.rules import Rules
from sglang_step35.guards.settings import parse
from sglang_step35.guards.vocabulary import vocabulary_of
from tests.support.plain_guards import guarded_greedy, token_bytes
from tests.support.toy_tokenizer import toy_tokenizer

TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)
THINK, THINK_END = TOKENIZER.convert_tokens_to_ids(["<think>", "</think>"])
CALLS = TOKENIZER.convert_tokens_to_ids(["<tool_call>", "</tool_call>"])
PROMPT = TOKENIZER("<|im_start|>user\nслово<|im_end|>\n<|im_start|>assistant\n<think>\n")["input_ids"]
BUDGET = {"reasoning": {"tokens": 9, "line": "Genug."}}
LOOP = {"loop": {"tokens": 2, "times": 3, "longest": 7, "line": "Immer dasselbe."}}
LANGUAGE = {"language": {"scripts": ["Cyrillic"]}}
PLAIN = {
    "budget": (BUDGET, {"budget": (9, "Genug.")}),
    "budget 0": ({"reasoning": {"tokens": 0}}, {"budget": (0, "")}),
    "loop": (LOOP, {"loop": (2, 3, 7, "Immer dasselbe.")}),
    "language": ({"reasoning": {"tokens": 0}} | LANGUAGE, {"budget": (0, ""), "scripts": ("Cyrillic",)}),
    "all": (
        BUDGET | LOOP | LANGUAGE,
        {"budget": (9, "Genug."), "loop": (2, 3, 7, "Immer dasselbe."), "scripts": ("Cyrillic",)},
    ),
}


def guarded(guards: dict, prompt=PROMPT, grammar=None) -> GuardedGrammar:
    return GuardedGrammar(Rules(parse(guards), vocabulary_of(TOKENIZER, V), prompt), grammar)


class Model:
    """Logits of a text: random, or in love with what it wrote some tokens ago; quotes, tags and bytes come often."""

    def __init__(self, seed: int):
        self.seed = seed
        often = [THINK, THINK_END, *CALLS, *TOKENIZER(' "`>\n', add_special_tokens=False)["input_ids"]]
        self.often = torch.tensor([v for v in range(V) if v in often or len(token_bytes(TOKENIZER)[v]) == 1])

    def __call__(self, ids: list[int]) -> torch.Tensor:
        chance = random.Random(f"{self.seed} {ids[len(PROMPT) :][-6:]}")
        row = torch.randn(V, generator=torch.Generator().manual_seed(chance.randrange(2**40)))
        row[self.often] += 0.5
        back = self.seed % 4 + 1
        if self.seed % 3 and len(ids) > len(PROMPT) + 8:
            row[ids[-back]] += 3
        return row


def choose(model: Model, grammar: GuardedGrammar, ids: list[int]) -> int:
    """The best token by the grammar's mask of one row, as plain decoding does."""
    row = grammar.allocate_vocab_mask(V, 1, "cpu")
    grammar.fill_vocab_mask(row, 0)
    logits = model(ids)[None].clone()
    grammar.apply_vocab_mask(logits, row)
    return logits.argmax().item()


def in_windows(model: Model, guards: dict, count: int, width: int, chance: random.Random) -> list[int]:
    """Drafts that are partly right, verified by SGLang's own walk over a window."""
    grammar, output = guarded(guards), []
    token = choose(model, grammar, PROMPT)
    grammar.accept_token(token)
    output.append(token)
    while len(output) < count:
        chain = [output[-1]]
        for _ in range(width - 1):  # what the model alone would say, or noise
            alone = model(PROMPT + output + chain[1:]).argmax().item()
            chain.append(alone if chance.random() < 0.8 else chance.randrange(V))
        links = torch.tensor([[*range(1, width), -1]])
        masks, found = generate_token_bitmask(
            [SimpleNamespace(grammar=grammar)], links, torch.full((1, width), -1), torch.tensor([chain]), V
        )
        assert found is grammar
        logits = torch.stack([model(PROMPT + output + chain[1 : j + 1]) for j in range(width)])
        grammar.apply_vocab_mask(logits, masks)
        best = logits.argmax(-1).tolist()
        kept = next((j for j in range(width - 1) if chain[j + 1] != best[j]), width - 1)
        for token in best[: kept + 1]:
            grammar.accept_token(token)
        output += best[: kept + 1]
    return output[:count]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("seed", range(6))
def test_windows_and_plain_decoding_equal_the_plain_loop(name, seed):
    guards, plain = PLAIN[name]
    model, count = Model(seed), 60
    wanted = guarded_greedy(model, TOKENIZER, PROMPT, count, **plain)
    grammar, output = guarded(guards), []
    for _ in range(count):
        output.append(choose(model, grammar, PROMPT + output))
        grammar.accept_token(output[-1])
    assert output == wanted
    for width in (2, 4, 13):
        assert in_windows(model, guards, count, width, random.Random(seed)) == wanted, width


def test_the_guards_have_something_to_do():
    """Else the test above would show nothing."""
    for name, (_, plain) in PLAIN.items():
        texts = [guarded_greedy(Model(seed), TOKENIZER, PROMPT, 60, **plain) for seed in range(6)]
        fewer = dict(list(plain.items())[:-1])
        free = [guarded_greedy(Model(seed), TOKENIZER, PROMPT, 60, **fewer) for seed in range(6)]
        assert sum(a != b for a, b in zip(texts, free, strict=True)) >= 3, name


def test_what_is_taken_back_leaves_no_trace():
    chance, model = random.Random(3), Model(4)
    grammar, output = guarded(BUDGET | LOOP | LANGUAGE), []
    for _ in range(60):
        drafts = [chance.randrange(V) for _ in range(chance.randrange(12))] + [THINK_END]
        for draft in drafts:
            grammar.accept_token(draft)
        grammar.rollback(len(drafts))
        output.append(choose(model, grammar, PROMPT + output))
        grammar.accept_token(output[-1])
    assert output == guarded_greedy(model, TOKENIZER, PROMPT, 60, **PLAIN["all"][1])


def test_events_say_what_was_done_and_where():
    grammar = guarded({"reasoning": {"tokens": 3, "line": "Halt."}, "loop": {"tokens": 1, "times": 3}})
    word = TOKENIZER("слово", add_special_tokens=False)["input_ids"]
    first, others = word[0], [t for t in word if t != word[0]]
    for token in [first, others[0], first]:
        assert grammar.events[0:99] == []
        grammar.accept_token(token)
    assert grammar.events[0:99] == [{"guard": "reasoning", "at": 2, "did": "ended the thinking"}]
    for token in [*TOKENIZER("\n\nHalt.\n</think>")["input_ids"], first, first, first]:
        grammar.accept_token(token)
    last = grammar.events[3:99]
    assert [(e["guard"], e["period"], e["did"]) for e in last] == [("loop", 1, "forbade the next repetition")]
    assert grammar.events[last[0]["at"] + 1 :] == [] and len(grammar.events[0:]) == 2
    grammar.rollback(1)
    assert len(grammar.events[0:]) == 1


def test_a_call_inside_the_thinking_is_not_cut():
    grammar = guarded(BUDGET | {"loop": {"tokens": 1, "times": 2, "line": "Halt."}})
    different = TOKENIZER.convert_tokens_to_ids(list("abcdefghijklm"))
    for token in [*different[:3], CALLS[0], *different[3:]]:
        grammar.accept_token(token)
    assert grammar.events[0:] == [] and len(left(grammar)) > 100
    grammar.accept_token(different[-1])
    assert [event["did"] for event in grammar.events[0:]] == ["forbade the next repetition"]
    grammar.accept_token(CALLS[1])
    assert [event["did"] for event in grammar.events[0:]][1:] == ["ended the thinking"] and len(left(grammar)) == 1


def test_no_thinking_at_all_is_an_event_of_the_first_token():
    grammar = guarded({"reasoning": {"tokens": 0}})
    assert grammar.events[0:1] == [{"guard": "reasoning", "at": 0, "did": "ended the thinking"}]
    grammar.accept_token(THINK_END)
    grammar.rollback(1)
    assert len(grammar.events[0:1]) == 1 and choose(Model(0), grammar, PROMPT) == THINK_END


@pytest.fixture(scope="module")
def backend():
    return XGrammarGrammarBackend(TOKENIZER, vocab_size=V)


def left(grammar: GuardedGrammar) -> list[str]:
    """What may come next."""
    row = grammar.allocate_vocab_mask(V, 1, "cpu")
    grammar.fill_vocab_mask(row, 0)
    return [TOKENIZER.decode(v) for v in range(V) if row[0, v // 32].item() >> v % 32 & 1]


def test_a_grammar_counts_more_than_a_guard_and_walks_along(backend):
    prompt, one = TOKENIZER("слово")["input_ids"], TOKENIZER.convert_tokens_to_ids("1")
    guards = {"language": {"scripts": ["Cyrillic"]}, "loop": {"tokens": 1, "times": 2}}
    own = backend.dispatch_regex("[1x]{3}1{3}").copy()
    grammar = guarded(guards, prompt, own)
    assert left(grammar) == ["1"], "x is Latin"
    grammar.accept_token(one)
    grammar.accept_token(one)
    assert left(grammar) == ["x"], "the loop guard has the first word"
    grammar.accept_token(one)
    assert left(grammar) == ["1"], "the grammar leaves nothing else"
    grammar.rollback(1)
    assert left(grammar) == ["x"]
    for _ in range(4):
        grammar.accept_token(one)
    assert not grammar.is_terminated()
    grammar.accept_token(TOKENIZER.eos_token_id)
    assert grammar.is_terminated() and own.is_terminated() and grammar.current_token == TOKENIZER.eos_token_id
    grammar.finished = True
    assert own.finished


def test_masks_fit_those_of_the_grammar_backend(backend):
    """A batch has one mask for all of its grammars."""
    own = backend.dispatch_regex("1*").allocate_vocab_mask(V, 3, "cpu")
    alone = guarded(BUDGET).allocate_vocab_mask(V, 3, "cpu")
    assert own.shape == alone.shape == (3, mask.words(V)) and own.dtype == alone.dtype
