"""Plan the memory of a Step-3.5 server: weights, KV pools, what fits on a machine, and the `sglang serve` command."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sglang_step35.assets import PUBLISHED_CONFIG
from sglang_step35.checkpoint.base import DamagedFile
from sglang_step35.config import ModelSpec, parse_config
from sglang_step35.config_fields import ConfigError
from sglang_step35.planner import PlanError
from sglang_step35.planner.elsewhere import judge
from sglang_step35.planner.hardware import LLAMA_CPP, MACHINES, Hardware, custom, host, machine
from sglang_step35.planner.plan import Wish, make_plan
from sglang_step35.planner.report import as_json, gib, judgement_json, judgement_text, text
from sglang_step35.planner.stored import Stored, read
from sglang_step35.planner.weights import QUANTIZATIONS


def main(argv: list[str]) -> int:
    """Print the plan. Returns 0, 1 when the wish does not fit, 2 for options that cannot be planned."""
    args = _parser().parse_args(argv)
    try:
        spec, model, stored = checkpoint(args.config)
        if all(given is None for given in (args.hardware, args.devices, args.memory_gb, args.cpu_memory_gb)):
            return _overview(spec, args)
        return _one(spec, model, stored, _machine(args), args)
    except (PlanError, ConfigError, DamagedFile) as error:
        print(f"plan: error: {error}", file=sys.stderr)
        return 2


def load(path: str | None) -> tuple[ModelSpec, str | None]:
    """(spec, model path) of a config.json or a GGUF file; the published config, without a path, for None."""
    return checkpoint(path)[:2]


def checkpoint(path: str | None) -> tuple[ModelSpec, str | None, Stored | None]:
    """`load`, and what the weights take where there are any. Raises PlanError, ConfigError, DamagedFile."""
    if path is None:
        return parse_config(json.loads(PUBLISHED_CONFIG.read_text())), None, None
    try:
        spec, stored = read(path)
    except OSError as error:
        raise PlanError(f"--config {path}: cannot read it: {error.strerror}") from None
    except (ConfigError, DamagedFile):
        raise
    except ValueError as error:
        raise PlanError(f"--config {path}: not JSON: {error}") from None
    where = Path(path).resolve()
    return spec, str(where.parent if where.suffix == ".json" else where), stored


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sglang_step35 plan", description=__doc__)
    add = parser.add_argument
    add("--config", metavar="PATH", help="config.json, its folder or a GGUF file (default: Step-3.5-Flash)")
    add("--hardware", metavar="NAME", help=f"one of {', '.join(MACHINES)}; without any, a line for each")
    add("--devices", type=_positive(int), metavar="N", help="number of CUDA devices, with --memory-gb")
    add("--memory-gb", type=_positive(float), metavar="X", help="memory of a device: nvidia-smi's MiB / 1024")
    add("--cpu-memory-gb", type=_positive(float), metavar="X", help="memory, in GiB, of a machine without a GPU")
    add("--quantization", choices=QUANTIZATIONS, help="default: the checkpoint's, or what suits the machine best")
    add("--tp", type=_positive(int), metavar="N", help="tensor-parallel size (default: all devices)")
    add("--ep", type=_positive(int), metavar="N", help="expert-parallel size, 1 or the tensor-parallel one")
    add(
        "--context",
        type=_positive(int),
        metavar="TOKENS",
        help="longest request with its answer (default: the model's)",
    )
    add("--concurrency", type=_positive(int), metavar="N", help="requests of that length at once (default: what fits)")
    add("--page-size", type=_positive(int), default=1, metavar="TOKENS", help="default: 1, as SGLang on CUDA")
    add("--mem-fraction-static", type=_share, metavar="F", help="default: SGLang's, or a tighter one where needed")
    add("--swa-full-tokens-ratio", type=_share, metavar="R", help="default: the smallest that serves the requests")
    add("--no-mtp", action="store_true", help="without speculation: no MTP weights, no MTP KV")
    add("--json", action="store_true", help="one line of JSON, in bytes and tokens")
    return parser


def _positive(kind: type) -> Any:
    def parse(word: str) -> Any:
        value = kind(word)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{word}: expected a number above 0")
        return value

    parse.__name__ = "number"  # argparse names it when a word is no number at all
    return parse


def _share(word: str) -> float:
    value = float(word)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{word}: expected a share above 0, up to 1")
    return value


def _machine(args: argparse.Namespace) -> Hardware:
    memories = [given for given in (args.devices, args.memory_gb, args.cpu_memory_gb) if given is not None]
    if args.hardware is not None:
        if memories:
            raise PlanError("--hardware: names the devices already; leave out --devices and what gives their memory")
        return machine(args.hardware)
    if args.cpu_memory_gb is not None:
        if len(memories) > 1:
            raise PlanError("--cpu-memory-gb: is for machines without a GPU; leave out --devices and --memory-gb")
        return host(args.cpu_memory_gb)
    if args.devices is None or args.memory_gb is None:
        missing = "--devices" if args.devices is None else "--memory-gb"
        raise PlanError(f"{missing}: missing; --devices and --memory-gb go together, or give --hardware")
    return custom(args.devices, args.memory_gb, "bf16")


def _wish(args: argparse.Namespace) -> Wish:
    return Wish(
        quantization=args.quantization,
        tp=args.tp,
        ep=args.ep,
        context=args.context,
        concurrency=args.concurrency,
        page_size=args.page_size,
        mem_fraction_static=args.mem_fraction_static,
        swa_ratio=args.swa_full_tokens_ratio,
        mtp=not args.no_mtp,
    )


def _one(spec: ModelSpec, model: str | None, stored: Stored | None, where: Hardware, args: argparse.Namespace) -> int:
    if where.engine == LLAMA_CPP:
        if model is not None:
            raise PlanError("--config: the GGUF figure is of the published Step-3.5-Flash; leave --config out")
        judgement = judge(spec, where, args.quantization, args.context)
        print(json.dumps(judgement_json(judgement)) if args.json else judgement_text(judgement))
        return 0 if judgement.fits else 1
    plan = make_plan(spec, where, _wish(args), stored)
    print(json.dumps(as_json(plan, model)) if args.json else text(plan, model))
    return 0 if plan.fits else 1


def _overview(spec: ModelSpec, args: argparse.Namespace) -> int:
    """A line for every machine, with what it is best used with."""
    for name in ("config", "quantization", "tp", "ep", "mem_fraction_static", "swa_full_tokens_ratio"):
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise PlanError(f"{option}: needs a machine; give --hardware, or its devices and memory")
    rows = []
    for name, where in MACHINES.items():
        if where.engine == LLAMA_CPP:
            rows.append(judgement_json(judge(spec, where, None, args.context)) | {"name": name})
        else:
            plan = make_plan(spec, where, Wish(context=args.context, concurrency=args.concurrency, mtp=not args.no_mtp))
            rows.append(as_json(plan) | {"name": name})
    if args.json:
        print(json.dumps({"machines": rows}))
    else:
        print("\n".join(_overview_lines(rows)))
    return 0


def _overview_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'machine':<12}{'engine':<11}{'weights':<8}{'GiB/device':>11}{'tokens':>9}  at once  longest request"]
    for row in rows:
        size = row["weight_bytes"]["resident"] if "weight_bytes" in row else row["gguf_q4_k_s_bytes"]
        count = row.get("requests_at_once", int(row["fits"]))
        longest = row.get("longest_request", "")
        lines.append(
            f"{row['name']:<12}{row['engine']:<11}{row['quantization']:<8}{gib(size):>11}{row['context']:>9}"
            f"{count:>9}  {longest}"
        )
    return [*lines, "", "details: --hardware NAME"]
