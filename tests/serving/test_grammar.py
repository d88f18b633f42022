"""A running server under grammars: random ones among requests that are broken, starved and aborted, with and without
speculation; and drafts that keep to the grammar. `scripts.benchmarks.fuzz_grammar` runs a thousand of these cases."""

import pytest

from tests.support.grammar_cases import stretches
from tests.support.grammar_fuzz import OFF_ARGS, mtp_args, run
from tests.support.nano_model import generate, histogram, prompts, reference
from tests.support.patterns import allowed

pytestmark = pytest.mark.server


@pytest.mark.parametrize("backend, first, count", [("llguidance", 40, 20), ("xgrammar", 0, 40)])
def test_random_grammars(serve, backend, first, count):
    parts = stretches(seed=1, first=first, count=count)
    plain, off = run(serve(*OFF_ARGS, backend), backend, parts)
    assert not plain.problems and not plain.dead_servers
    report, _ = run(serve(*mtp_args(backend)), backend, parts, off)
    assert not report.problems, "\n".join(report.problems)
    assert not report.dead_servers and report.cases > count * 0.7
    assert report.statuses["finished"] > count / 3
    assert report.tokens / report.rounds > 1.5


def test_accepted_drafts_equal_an_offline_loop_whose_layers_keep_to_the_grammar(serve):
    server = serve(*mtp_args("xgrammar"))
    pattern = r"([a-z]{2,5} = [0-9]{1,4}\n){50}"
    for ids in prompts()[:4]:
        tokens, accepted = reference().speculative_greedy(ids, 40, 3, allowed=lambda out: allowed(pattern, tuple(out)))
        answer = generate(server, ids, 40, regex=pattern)
        assert answer["output_ids"] == tokens[:40]
        assert histogram(answer) == [accepted.count(i) for i in range(4)]
