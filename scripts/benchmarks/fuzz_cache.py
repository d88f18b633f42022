"""Fuzz the prefix cache: requests that share prefixes at random, with a small cache and without one.

    python -m scripts.benchmarks.fuzz_cache [--requests 2000] [--seed 0] [--pages 1 16]

A server without a prefix cache answers first; then, for each page size, one with a cache of 2,048
tokens (512 for the sliding layers) answers the same requests, evicting and retracting on the way.
MTP is on, everything is float32. Exits with 1 if an id or a request's accepted drafts differ. Ends
in one JSON line.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from sglang_step35.bench.servers import ServerPool
from tests.support.cache_fuzz import OFF_ARGS, SMALL_ARGS, Report, record, replay

SHOWN = 5  # differing requests printed in full
COLUMNS = ("requests", "hits", "cached_tokens", "evicted_tokens", "retracted", "differing_ids", "differing_histograms")


def main() -> None:
    options = parse_options()
    reports: dict[int, Report] = {}
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder))
        try:
            rounds = record(pool.get(*OFF_ARGS, *options.server_args), options.requests, options.seed)
            pool.stop_all()
            for page in options.pages:
                server = pool.get(*SMALL_ARGS, "--page-size", str(page), *options.server_args)
                reports[page] = replay(server, rounds)
                print_report(page, reports[page])
                pool.stop_all()
        finally:
            pool.stop_all()
    rows = [{"page": page, **asdict(report)} for page, report in reports.items()]
    print(json.dumps({"bench": "fuzz_cache", "seed": options.seed, "results": rows}))
    if any(report.problems for report in reports.values()):
        sys.exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="for all servers; last option")
    return parser.parse_args()


def print_report(page: int, report: Report) -> None:
    print("  ".join(["page", *COLUMNS]))
    values = [page, *(int(getattr(report, name)) for name in COLUMNS)]
    names = ("page", *COLUMNS)
    print("  ".join(f"{value:{len(name)}d}" for name, value in zip(names, values, strict=True)))
    for problem in report.problems[:SHOWN]:
        print(problem)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
