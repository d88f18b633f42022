"""Fuzz the prefix cache: requests that share prefixes at random, with a small cache and without one.

    python -m scripts.benchmarks.fuzz_cache [--requests 2000] [--seed 0] [--pages 1 16]
                                            [--host write_through write_back file]

A server without a prefix cache answers first; then, for each page size, one with a cache of 2,048
tokens (512 for the sliding layers) answers the same requests, evicting and retracting on the way. With
--host what is evicted is kept in host memory and loaded again, under each of these policies; `file` has
as little of it as SGLang allows and reads files for the rest. MTP is on, everything is float32. Exits
with 1 if an id or a request's accepted drafts differ. Ends in one JSON line.
"""

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import requests

from sglang_step35.bench.servers import Server, ServerPool
from tests.support.cache_fuzz import HOST_ARGS, OFF_ARGS, SMALL_ARGS, Report, record, replay

NO_HOST, HOST = "none", ("write_through", "write_back", "file")
SHOWN = 5  # differing requests printed in full
COLUMNS = (
    "requests", "hits", "cached_tokens", "loaded_tokens", "evicted_tokens", "retracted", "differing_ids",
    "differing_histograms",
)  # fmt: skip


def main() -> None:
    options = parse_options()
    reports: dict[tuple[int, str], Report] = {}
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder))
        try:
            rounds = record(pool.get(*OFF_ARGS, *options.server_args), options.requests, options.seed)
            pool.stop_all()
            for case in itertools.product(options.pages, options.host or [NO_HOST]):
                args = (*server_args(*case, Path(folder)), *options.server_args)
                reports[case] = replayed(pool.get(*args), rounds)
                print_report(*case, reports[case])
                pool.stop_all()
        finally:
            pool.stop_all()
    rows = [{"page": page, "host": host, **asdict(report)} for (page, host), report in reports.items()]
    print(json.dumps({"bench": "fuzz_cache", "seed": options.seed, "results": rows}))
    if any(report.problems for report in reports.values()):
        sys.exit(1)


def replayed(server: Server, rounds: list) -> Report:
    try:
        return replay(server, rounds)
    except requests.RequestException:
        print(server.tail())  # the log goes with the folder
        raise


def server_args(page: int, host: str, folder: Path) -> tuple[str, ...]:
    paged = ("--page-size", str(page))
    if host == NO_HOST:
        return (*SMALL_ARGS, *paged)
    if host == "file":
        extra = json.dumps({"file_storage_path": str(folder / f"kv-{page}"), "prefetch_threshold": 16})
        return (
            *HOST_ARGS, *paged, "--hicache-ratio", "1.1", "--hicache-storage-backend", "file",
            "--hicache-storage-prefetch-policy", "wait_complete", "--hicache-storage-backend-extra-config", extra,
        )  # fmt: skip
    return (*HOST_ARGS, *paged, "--hicache-write-policy", host)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--host", nargs="+", choices=HOST, help="where evicted KV goes")
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="for all servers; last option")
    return parser.parse_args()


def print_report(page: int, host: str, report: Report) -> None:
    print(f"page {page}, host memory: {host}")
    print("  ".join(COLUMNS))
    print("  ".join(f"{int(getattr(report, name)):{len(name)}d}" for name in COLUMNS))
    for problem in report.problems[:SHOWN]:
        print(problem)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
