"""Fuzz structured output: random schemas, regular expressions, EBNF and tool choices, with MTP and without it.

    python -m scripts.benchmarks.fuzz_grammar [--cases 500] [--first 0] [--seed 0] [--backends xgrammar llguidance]

For each backend a server without speculation answers the greedy cases, then one with MTP all of them, 1 to 16 at once,
among requests that are aborted or whose grammar is broken or forbids everything. Float32. Right is an answer that an
independent judge finds to be of the language; greedy ones must be the same on both servers. A run may be taken in parts
(`--first`). Exits with 1 if anything is wrong. Ends in one JSON line.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from sglang_step35.bench.servers import ServerPool
from tests.support.grammar_cases import Stretch, stretches
from tests.support.grammar_fuzz import OFF_ARGS, Outcome, Report, mtp_args, run
from tests.support.warm import start_server

SHOWN = 8  # problems printed in full
COLUMNS = (
    "cases", "finished", "thinking", "length", "stopped", "refused", "failed", "aborted", "invalid", "differing", "dead"
)  # fmt: skip


def main() -> None:
    options = parse_options()
    parts = stretches(options.seed, options.first, options.cases)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder), start=start_server)
        try:
            for backend in options.backends:
                off: dict[int, Outcome] | None = None
                for name, args in (("off", (*OFF_ARGS, backend)), ("mtp", mtp_args(backend, options.width))):
                    report, outcomes = answers(pool, args, backend, parts, off)
                    off = off or outcomes
                    rows.append(row(backend, name, report))
                    show(rows[-1], report)
        finally:
            pool.stop_all()
    facts = {"bench": "fuzz_grammar", "seed": options.seed, "first": options.first, "width": options.width}
    print(json.dumps(facts | {"results": rows}))
    if any(r["invalid"] or r["differing"] or r["dead"] for r in rows):
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500, help="for each backend")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", nargs="+", default=["xgrammar", "llguidance"])
    parser.add_argument("--width", type=int, default=4, help="--speculative-num-draft-tokens; above 4 with look-ups")
    return parser.parse_args()


def answers(pool: ServerPool, args: tuple[str, ...], backend: str, parts: list[Stretch], off) -> tuple[Report, dict]:
    """One server's, which is stopped again."""
    server = pool.get(*args)
    report, outcomes = run(server, backend, parts, off)
    if report.dead_servers:
        report.problems.insert(0, f"the server's log ends:\n{server.tail()}")
    pool.stop_all()
    return report, outcomes


def row(backend: str, name: str, report: Report) -> dict:
    values = {**report.statuses, "cases": report.cases, "invalid": report.invalid, "differing": report.differing}
    values["dead"] = report.dead_servers
    length = round(report.tokens / report.rounds, 3) if report.rounds else None
    return {"backend": backend, "speculation": name, **{c: values.get(c, 0) for c in COLUMNS}, "accept_length": length}


def show(values: dict, report: Report) -> None:
    print("  ".join(f"{name} {value}" for name, value in values.items()))
    for problem in report.problems[:SHOWN]:
        print(problem)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
