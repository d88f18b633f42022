"""The checkpoint that copies does so by the reference, and its MTP layers draft every token of the copy."""

from scripts.benchmarks.copying import CONTEXT, write
from tests.support.nano_model import prompts
from tests.support.reference import load_reference


def test_the_answer_and_all_drafts_are_the_prompts_own_text(tmp_path):
    reference = load_reference(write(tmp_path))
    text = [*prompts()[0], *prompts()[1]][:120]
    ids = [*text, 3, *text[40 : 40 + CONTEXT]]
    tokens, accepted = reference.speculative_greedy(ids, 16, 3)
    assert tokens == text[40 + CONTEXT :][:16] and set(accepted) == {3}
