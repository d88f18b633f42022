"""Decode speed with MTP on and off, same prompts, same run, on the packaged nano checkpoint.

    python -m scripts.benchmarks.mtp [--prompts 12] [--tokens 128] [--passes 3] [--dtype bfloat16] [--plot FILE]

Four servers at once, asked in turn, one request at a time: MTP, adaptive MTP, speculation off, and
SGLang's own torch_native attention without speculation. A machine that slows down for a minute thus
slows all of them; the median pass counts. Workloads: held-out code; random ids at temperature 3; and,
because the nano checkpoint drafts well on both, the code with MTP layers whose weights are shuffled,
which draft nothing useful. Ends in one JSON line.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sglang_step35.assets import NANO
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, ServerPool
from tests.support.nano_model import generate, histogram, prompts, random_ids

VARIANTS = {
    "mtp": MTP_ARGS,
    "mtp adaptive": (*MTP_ARGS, "--speculative-adaptive"),
    "off": (),
    # SGLang's own attention reads the hybrid pool wrongly, so it gets a plain one.
    "off, torch_native": ("--attention-backend", "torch_native", "--disable-hybrid-swa-memory"),
}


@dataclass(frozen=True)
class Measurement:
    """One variant on one workload; acceptance[i]: share of rounds that accepted draft i + 1."""

    variant: str
    workload: str
    tokens_per_second: float
    milliseconds_per_token: float
    accept_length: float
    acceptance: list[float]


def workloads(count: int) -> dict[str, tuple[list[list[int]], dict]]:
    """Prompts and sampling options of the packaged checkpoint's workloads."""
    return {
        "code": (prompts()[:count], {}),
        "random": (random_ids(count, 60, seed=9), {"temperature": 3.0}),
    }


def shuffled_drafts(directory: Path) -> Path:
    """The packaged checkpoint with shuffled input projections in its MTP layers."""
    shutil.copytree(NANO, directory)
    weights = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith(".eh_proj.weight"):
            order = torch.randperm(weight.numel(), generator=generator)
            weights[name] = weight.flatten()[order].view(weight.shape)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def measure(servers: dict, workload: str, requests, options, sampling: dict) -> list[Measurement]:
    """Passes over the prompts, every server in turn; the first pass warms caches up."""
    seconds, answers = {variant: [] for variant in servers}, {variant: [] for variant in servers}
    for number in range(1 + options.passes):
        for variant, server in servers.items():
            start = time.perf_counter()
            found = [generate(server, ids, options.tokens, **sampling) for ids in requests]
            if number:
                seconds[variant].append(time.perf_counter() - start)
                answers[variant] += found
    return [
        summary(variant, workload, options.tokens * len(requests), seconds[variant], answers[variant])
        for variant in servers
    ]


def summary(variant: str, workload: str, count: int, seconds: list[float], answers) -> Measurement:
    """count: tokens of a pass. seconds: one entry a pass. answers: of all passes."""
    totals = [sum(counts) for counts in zip(*map(histogram, answers), strict=True)]
    rounds = sum(totals)
    acceptance = [round(sum(totals[i:]) / rounds, 3) for i in (1, 2, 3)] if rounds else []
    pass_seconds = statistics.median(seconds)
    return Measurement(
        variant=variant,
        workload=workload,
        tokens_per_second=round(count / pass_seconds, 1),
        milliseconds_per_token=round(1000 * pass_seconds / count, 2),
        accept_length=round(len(seconds) * count / rounds, 2) if rounds else 1.0,
        acceptance=acceptance,
    )


def table(results: list[Measurement]) -> str:
    base = {r.workload: r.tokens_per_second for r in results if r.variant == "off"}
    lines = [f"{'workload':9}{'variant':19}{'tok/s':>8}{'ms/tok':>8}{'accept':>8}{'ratio':>7}  per draft"]
    for r in sorted(results, key=lambda r: r.workload):
        ratio = r.tokens_per_second / base[r.workload]
        lines.append(
            f"{r.workload:9}{r.variant:19}{r.tokens_per_second:8.1f}{r.milliseconds_per_token:8.2f}"
            f"{r.accept_length:8.2f}{ratio:7.2f}  {' '.join(f'{a:.2f}' for a in r.acceptance)}"
        )
    return "\n".join(lines)


def plot(results: list[Measurement], path: Path) -> None:
    """Tokens per second as bars, one group per workload, the accept length above each bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({r.workload for r in results})
    figure, axes = pyplot.subplots(figsize=(8, 4))
    width = 0.8 / len(VARIANTS)
    for i, variant in enumerate(VARIANTS):
        rows = {r.workload: r for r in results if r.variant == variant}
        places = [n + i * width for n in range(len(names))]
        bars = axes.bar(places, [rows[n].tokens_per_second for n in names], width, label=variant)
        axes.bar_label(bars, [f"{rows[n].accept_length:.2f}" for n in names], fontsize=8)
    axes.set_xticks([n + 0.3 for n in range(len(names))], names)
    axes.set_ylabel("tokens per second, one request")
    axes.set_title("nano checkpoint on two CPU cores; above the bars: accept length")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--passes", type=int, default=3, help="measured, after one to warm up")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plot", type=Path, help="also write a PNG here")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder), alive=len(VARIANTS))
        shuffled = shuffled_drafts(Path(folder) / "shuffled")
        checkpoints = [
            (NANO, workloads(options.prompts)),
            (shuffled, {"shuffled": (prompts()[: options.prompts], {})}),
        ]
        try:
            for model, tasks in checkpoints:
                common = (*NANO_ARGS, "--model-path", str(model), "--dtype", options.dtype)
                servers = {v: pool.get(*common, *flags) for v, flags in VARIANTS.items()}
                for name, (requests, sampling) in tasks.items():
                    results += measure(servers, name, requests, options, sampling)
                pool.stop_all()
        finally:
            pool.stop_all()
    if options.plot:
        plot(results, options.plot)
    print(table(results))
    print(json.dumps({"bench": "mtp", "dtype": options.dtype, "results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
