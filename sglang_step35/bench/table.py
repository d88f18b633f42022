"""Runs side by side on a terminal. Apart from the HTML report, so that a load test needs no matplotlib."""

from collections.abc import Sequence

from sglang_step35.bench.stats import Cell, Run, workloads_of


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(cell: Cell, base: Cell | None) -> float | None:
    if base is None or not base.tokens_per_second or not cell.tokens_per_second:
        return None
    return cell.tokens_per_second / base.tokens_per_second


def table(runs: Sequence[Run]) -> str:
    """One line for every cell, runs of the same cell below each other; ratios are to the first run."""
    lines = [
        f"{'workload':9}{'clients':>8}  {'run':12}{'tok/s':>9}{'ratio':>7}{'TTFT p50':>10}{'p95':>9}{'TPOT p50':>10}"
        f"{'p95':>8}{'accept':>8}{'hits':>6}{'err':>5}  per position"
    ]
    for workload in workloads_of(runs):
        bases = {c.concurrency: c for c in runs[0].cells if c.workload == workload}
        pairs = [(run, cell) for run in runs for cell in run.cells if cell.workload == workload]
        for run, cell in sorted(pairs, key=lambda pair: pair[1].concurrency):
            ttft, tpot = cell.ttft, cell.tpot
            lines.append(
                f"{workload:9}{cell.concurrency:8}  {run.label:12}{number(cell.tokens_per_second):>9}"
                f"{number(ratio(cell, bases.get(cell.concurrency)), 2):>7}"
                f"{number(ttft.p50 if ttft else None):>10}{number(ttft.p95 if ttft else None):>9}"
                f"{number(tpot.p50 if tpot else None, 2):>10}{number(tpot.p95 if tpot else None, 2):>8}"
                f"{number(cell.accept_length, 2):>8}{number(cell.cache_hit_rate, 2):>6}{cell.failed:5}"
                f"  {' '.join(f'{share:.2f}' for share in cell.acceptance or ())}"
            )
    return "\n".join(lines)
