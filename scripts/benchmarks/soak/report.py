"""Table and plot of a soak."""

from pathlib import Path

from scripts.benchmarks.soak.checks import Sample


def table(samples: list[Sample]) -> str:
    lines = [f"{'minutes':>8}{'RSS MiB':>10}{'files':>7}{'threads':>9}"]
    return "\n".join([*lines, *(f"{s.minutes:8.1f}{s.rss_mib:10.1f}{s.files:7d}{s.threads:9d}" for s in samples)])


def plot(samples: list[Sample], path: Path) -> None:
    """Resident memory, open files and threads over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"resident memory, MiB": "rss_mib", "open files": "files", "threads": "threads"}
    figure, row = pyplot.subplots(1, len(panels), figsize=(12, 3.2))
    for axes, (title, name) in zip(row, panels.items(), strict=True):
        axes.plot([s.minutes for s in samples], [getattr(s, name) for s in samples], "o-", markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("minutes", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, bbox_inches="tight")
