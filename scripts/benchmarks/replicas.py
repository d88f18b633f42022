"""Where conversations go: cache-aware routing against round-robin, by the hit rates of the agent workload.

    python -m scripts.benchmarks.replicas [--replicas 2] [--sessions 12] [--turns 6] [--concurrency 4] [--out FILE]

Nano servers with MTP behind sglang-router, one policy after the other with empty caches. Prints a table and one JSON
line: share of prompt tokens that came from a prefix cache, requests of each replica, tokens a second.
"""

import argparse
import asyncio
import json
import re
import tempfile
from pathlib import Path

from scripts.replicas.supervisor import Replicas
from sglang_step35.bench.load import Endpoint
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, Server
from sglang_step35.bench.sweep import Settings, run
from sglang_step35.bench.workloads import Sizes

POLICIES = ("round_robin", "cache_aware")
MODEL = "step3p5-nano"
REQUESTS = re.compile(r"^sglang:num_requests_total\{.*\} (\S+)$", re.M)


def main() -> None:
    options = parse_options()
    args = (*NANO_ARGS, *MTP_ARGS, "--dtype", "bfloat16", "--enable-metrics", "--enable-cache-report")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        group = Replicas(args, options.replicas, Path(folder), options.port, policy=POLICIES[0])
        try:
            for policy in POLICIES:
                rows.append(measure(group, policy, options))
        finally:
            group.close()
    print_table(rows)
    line = json.dumps({"bench": "replicas", **settings(options), "results": rows})
    print(line)
    if options.out:
        options.out.write_text(line + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--turns", type=int, default=6, help="of a session")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--port", type=int, default=8400, help="of the router; the replicas take the ones after it")
    parser.add_argument("--out", type=Path, help="write the JSON line here, too")
    return parser.parse_args()


def settings(options: argparse.Namespace) -> dict:
    return {name: getattr(options, name) for name in ("replicas", "sessions", "turns", "concurrency", "tokens")}


def measure(group: Replicas, policy: str, options: argparse.Namespace) -> dict:
    """One policy, its router new and all caches empty."""
    group.route(policy=policy)
    urls = [replica.server.url for replica in group.replicas]
    group.router.wait_for(urls)
    for replica in group.replicas:
        replica.server.flush_cache()
    before = [requests_of(replica.server) for replica in group.replicas]
    work = Settings(
        workloads=("agent",),
        concurrency=(options.concurrency,),
        requests=options.sessions * options.turns,
        tokens=options.tokens,
        warm_up=0,
        sizes=Sizes(agent_turns=options.turns),
    )
    endpoint = Endpoint(group.router.url, MODEL, engine="sglang")
    (found,) = asyncio.run(run({policy: endpoint}, work))
    (cell,) = found.cells
    after = [requests_of(replica.server) for replica in group.replicas]
    return {
        "policy": policy,
        "hit_rate": round(cell.cache_hit_rate, 3),
        "requests": [round(b - a) for a, b in zip(before, after, strict=True)],
        "failed": cell.failed,
        "tokens_per_second": round(cell.tokens_per_second, 1),
        "ttft_p50_ms": round(cell.ttft.p50, 1),
    }


def requests_of(server: Server) -> float:
    """Requests this replica has taken."""
    return sum(float(count) for count in REQUESTS.findall(server.metrics()))


def print_table(rows: list[dict]) -> None:
    print("| policy | cache hits | requests of each replica | failed | tok/s | TTFT p50 |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['policy']} | {100 * row['hit_rate']:.1f} % | {' + '.join(map(str, row['requests']))} "
            f"| {row['failed']} | {row['tokens_per_second']} | {row['ttft_p50_ms']} ms |"
        )


if __name__ == "__main__":
    main()
