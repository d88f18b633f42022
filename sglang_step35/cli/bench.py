"""Load test of OpenAI-compatible endpoints, and a report that compares runs side by side.

    python -m sglang_step35 bench run http://localhost:8000 --label mtp --model step3p5-flash \\
        --workload code,chat,agent --concurrency 1,4,16 --requests 32 --tokens 256 --out mtp.json
    python -m sglang_step35 bench report off.json mtp.json --html report.html --png report.png
    python -m sglang_step35 bench nano --out scripts/results/serving

`run` takes any endpoint: this package, stock SGLang, vLLM, llama.cpp, a hosted API (--api-key-file,
and --chat-only where there is no /v1/completions). `nano` starts the packaged model with speculation
off and on and writes FILE.json, FILE.png and FILE.html. Each ends in one JSON line.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from sglang_step35.bench.load import EXTRA_FIELDS, Endpoint
from sglang_step35.bench.stats import Run, run_from_json, run_to_json
from sglang_step35.bench.sweep import Settings, run
from sglang_step35.bench.table import table
from sglang_step35.bench.workloads import WORKLOADS, Sizes, parse_names

NANO_VARIANTS = ("off", "mtp", "adaptive")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def workload_names(text: str) -> tuple[str, ...]:
    try:
        return parse_names(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def variant_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(NANO_VARIANTS):
        raise argparse.ArgumentTypeError(f"unknown variant {', '.join(unknown)}; known: {', '.join(NANO_VARIANTS)}")
    if len(names) > 2:
        raise argparse.ArgumentTypeError("two variants at most: both servers are kept running")
    return names


def add_settings(parser: argparse.ArgumentParser, requests: int, tokens: int) -> None:
    sizes = Sizes()
    parser.add_argument("--workload", type=workload_names, default=tuple(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--concurrency", type=numbers, default=(1, 4), help="clients at once, as 1,4,16")
    parser.add_argument("--requests", type=int, default=requests, help="for each workload and concurrency")
    parser.add_argument("--tokens", type=int, default=tokens, help="output tokens of a request")
    parser.add_argument("--warm-up", type=int, default=2, help="uncounted requests before each workload")
    parser.add_argument("--seed", type=int, default=0, help="another seed sends other prompts")
    parser.add_argument("--long-characters", type=int, default=sizes.long_characters)
    parser.add_argument("--agent-turns", type=int, default=sizes.agent_turns)


def settings_of(options: argparse.Namespace) -> Settings:
    return Settings(
        workloads=options.workload,
        concurrency=options.concurrency,
        requests=options.requests,
        tokens=options.tokens,
        warm_up=options.warm_up,
        seed=options.seed,
        sizes=Sizes(long_characters=options.long_characters, agent_turns=options.agent_turns),
    )


def command_run(options: argparse.Namespace) -> list[Run]:
    key = options.api_key_file.read_text().strip() if options.api_key_file else None
    endpoint = Endpoint(
        options.url, options.model, options.engine, key, chat_only=options.chat_only, timeout=options.timeout
    )
    runs = asyncio.run(run({options.label: endpoint}, settings_of(options), say=complain))
    options.out.write_text(json.dumps(run_to_json(runs[0]), indent=1) + "\n")
    return runs


def command_report(options: argparse.Namespace) -> list[Run]:
    runs = [found for path in options.files for found in load(path)]
    write_report(runs, options.html, options.png)
    return runs


def command_nano(options: argparse.Namespace) -> list[Run]:
    """Both servers at once, measured in turns: other load on the machine then meets both alike."""
    from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, ServerPool

    flags = {"off": (), "mtp": MTP_ARGS, "adaptive": (*MTP_ARGS, "--speculative-adaptive")}
    # With speculation SGLang runs 48 requests at once where no flag says otherwise, without it as many as fit.
    at_once = ("--max-running-requests", str(max(options.concurrency)))
    common = (*NANO_ARGS, *at_once, "--dtype", "bfloat16", "--enable-metrics", "--enable-cache-report")
    groups = [(name,) for name in options.variants] if options.one_at_a_time else [options.variants]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder))
        try:
            for group in groups:
                servers = {name: pool.get(*common, *flags[name]) for name in group}
                targets = {name: Endpoint(server.url, "step3p5-nano") for name, server in servers.items()}
                runs += asyncio.run(run(targets, settings_of(options), say=complain))
                pool.stop_all()
        finally:
            pool.stop_all()
    data = {"runs": [run_to_json(found) for found in runs]}
    options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    write_report(runs, options.out.with_suffix(".html"), options.out.with_suffix(".png"))
    return runs


def write_report(runs: list[Run], html: Path | None, png: Path | None) -> None:
    from sglang_step35.bench import plots, report  # only here: `run` works where there is no matplotlib

    if html:
        html.write_text(report.html(runs))
    if png:
        png.write_bytes(plots.overview(runs))


def load(path: Path) -> list[Run]:
    """A file of `run` holds one run, a file of `nano` several."""
    data = json.loads(path.read_text())
    try:
        return [run_from_json(entry) for entry in data.get("runs", [data])]
    except ValueError as error:
        raise SystemExit(f"bench: {path}: {error}") from None


def complain(text: str) -> None:
    print(text, file=sys.stderr)


def summary(runs: list[Run]) -> dict:
    """The last line: enough to follow over time; everything else is in the run file."""
    keys = ("workload", "concurrency", "tokens_per_second", "accept_length", "cache_hit_rate", "failed")
    rows = [{"run": r.label, **{key: getattr(c, key) for key in keys}} for r in runs for c in r.cells]
    return {"bench": "serving", "results": rows}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_step35 bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="measure one endpoint")
    one.add_argument("url")
    one.add_argument("--label", required=True, help="name of the run in reports")
    one.add_argument("--model", required=True, help="served model name")
    one.add_argument("--engine", choices=tuple(EXTRA_FIELDS), default="other", help="otherwise /v1/models is asked")
    one.add_argument("--api-key-file", type=Path)
    one.add_argument("--chat-only", action="store_true", help="the endpoint has no /v1/completions")
    one.add_argument("--timeout", type=float, default=600, help="seconds for one request")
    one.add_argument("--out", type=Path, required=True)
    add_settings(one, requests=16, tokens=128)
    one.set_defaults(command=command_run)
    side = commands.add_parser("report", help="compare run files; ratios are to the first run")
    side.add_argument("files", type=Path, nargs="+")
    side.add_argument("--html", type=Path)
    side.add_argument("--png", type=Path)
    side.set_defaults(command=command_report)
    nano = commands.add_parser("nano", help="measure the packaged model on the CPU, speculation off and on")
    nano.add_argument("--out", type=Path, required=True, help="path without suffix")
    nano.add_argument(
        "--variants",
        type=variant_names,
        default=("off", "mtp"),
        help=f"two of {', '.join(NANO_VARIANTS)}",
    )
    nano.add_argument("--one-at-a-time", action="store_true", help="half the memory, but no turns between servers")
    add_settings(nano, requests=12, tokens=64)
    nano.set_defaults(command=command_nano)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = parse(argv)
    for path in (getattr(options, name, None) for name in ("out", "html", "png")):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    try:
        runs = options.command(options)
    except ValueError as error:
        raise SystemExit(f"bench: {error}") from None
    print(table(runs))
    print(json.dumps(summary(runs)))
