"""PNG plots of runs side by side: one column per workload, one row per quantity."""

import io
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from sglang_step35.bench.stats import Cell, Run, workloads_of

COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
Points = tuple[float | None, float | None]  # the bar, and the end of its whisker


def _p50_p95(name: str) -> Callable[[Cell], Points]:
    def read(cell: Cell) -> Points:
        spread = getattr(cell, name)
        return (spread.p50, spread.p95) if spread else (None, None)

    return read


ROWS: tuple[tuple[str, Callable[[Cell], Points]], ...] = (
    ("tokens per second", lambda cell: (cell.tokens_per_second, None)),
    ("TTFT ms, p50 to p95", _p50_p95("ttft")),
    ("TPOT ms, p50 to p95", _p50_p95("tpot")),
    ("accept length", lambda cell: (cell.accept_length, None)),
    ("cache hit rate", lambda cell: (cell.cache_hit_rate, None)),
)


def _bars(axes: Axes, runs: Sequence[Run], workload: str, read: Callable[[Cell], Points]) -> None:
    """A group of bars per concurrency, one bar per run; nothing where a run does not know."""
    levels = sorted({c.concurrency for run in runs for c in run.cells if c.workload == workload})
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        found = {c.concurrency: read(c) for c in run.cells if c.workload == workload}
        for place, level in enumerate(levels):
            value, end = found.get(level, (None, None))
            if value is None:
                continue
            whisker = [[0], [max(end - value, 0)]] if end is not None else None
            x = place + (i - (len(runs) - 1) / 2) * width
            axes.bar(x, value, width, yerr=whisker, color=COLORS[i % len(COLORS)], capsize=2, error_kw={"lw": 0.8})
            text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
            axes.annotate(text, (x, max(value, end or 0)), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(levels)), [str(level) for level in levels])
    axes.set_xlim(-0.6, len(levels) - 0.4)
    axes.margins(y=0.15)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def overview(runs: Sequence[Run]) -> bytes:
    """All workloads and quantities, each panel on its own scale: prompts of 30 and of 2000 tokens differ too much."""
    names = workloads_of(runs)
    size = (2.1 * len(names) + 1.2, 1.9 * len(ROWS) + 1)
    figure, grid = pyplot.subplots(len(ROWS), len(names), figsize=size, squeeze=False)
    for row, (title, read) in zip(grid, ROWS, strict=True):
        for axes, name in zip(row, names, strict=True):
            _bars(axes, runs, name, read)
        row[0].set_ylabel(title, fontsize=9)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=10)
    for axes in grid[-1]:
        axes.set_ylim(0, 1.1)  # the hit rate is a share: 0.2 % should look like nothing
        axes.set_xlabel("concurrent clients", fontsize=8)
    _legend(figure, runs)
    return _png(figure)


def positions(runs: Sequence[Run]) -> bytes | None:
    """Acceptance by draft position at each workload's lowest concurrency; None when no run speculates."""
    if not any(cell.acceptance for run in runs for cell in run.cells):
        return None
    names = workloads_of(runs)
    figure, row = pyplot.subplots(1, len(names), figsize=(2.1 * len(names) + 1.2, 2.6), sharey=True, squeeze=False)
    for axes, name in zip(row[0], names, strict=True):
        for i, run in enumerate(runs):
            cells = [c for c in run.cells if c.workload == name and c.acceptance]
            if cells:
                shares = min(cells, key=lambda c: c.concurrency).acceptance or []
                axes.plot(range(1, len(shares) + 1), shares, "o-", color=COLORS[i % len(COLORS)])
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("draft position", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    row[0][0].set_ylim(0, 1)
    row[0][0].set_ylabel("share of rounds accepted", fontsize=9)
    _legend(figure, runs)
    return _png(figure)


def _legend(figure, runs: Sequence[Run]) -> None:
    marks = [pyplot.Rectangle((0, 0), 1, 1, color=COLORS[i % len(COLORS)]) for i in range(len(runs))]
    figure.tight_layout()
    labels = [run.label for run in runs]
    figure.legend(marks, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=6, fontsize=9, frameon=False)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    pyplot.close(figure)
    return buffer.getvalue()
