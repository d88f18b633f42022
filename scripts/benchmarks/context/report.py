"""Table, ratios to stock and plot of bench_context.py."""

from pathlib import Path

from scripts.benchmarks.context.serving import Measurement

HEADER = (
    f"{'variant':26}{'length':>8}{'prefill s':>10}{'hit s':>8}{'cached':>8}{'ms/tok':>8}{'tok/s':>8}"
    f"{'accept':>7}{'RSS MiB':>8}{'full':>8}{'sliding':>8}{'peak':>7}"
)


def line(m: Measurement) -> str:
    hit = "-" if m.hit_seconds is None else f"{m.hit_seconds:.3f}"
    peak = "-" if m.sliding_peak_tokens is None else str(m.sliding_peak_tokens)
    return (
        f"{m.variant:26}{m.length:8d}{m.prefill_seconds:10.2f}{hit:>8}{m.cached_tokens:8d}"
        f"{m.decode_ms:8.2f}{m.decode_rate:8.1f}{m.accept_length:7.2f}{m.rss_mib:8d}"
        f"{m.full_pool_tokens:8d}{m.sliding_pool_tokens:8d}{peak:>7}"
    )


def ratios(results: list[Measurement], ours: tuple[str, ...], stock: tuple[str, ...]) -> list[dict]:
    """For each length that both ran: stock's time divided by ours, above 1 where ours is faster."""
    found = {(m.variant, m.length): m for m in results}
    rows = []
    for length in sorted({m.length for m in results}):
        for other in stock:
            for own in ours:
                if (own, length) in found and (other, length) in found:
                    rows.append(_ratio(found[own, length], found[other, length]))
    return rows


def _ratio(own: Measurement, other: Measurement) -> dict:
    hit = None if other.hit_seconds is None else round(other.hit_seconds / own.hit_seconds, 2)
    return {
        "length": own.length,
        "ours": own.variant,
        "stock": other.variant,
        "prefill": round(other.prefill_seconds / own.prefill_seconds, 2),
        "hit": hit,
        "decode": round(other.decode_ms / own.decode_ms, 2),
    }


def ratio_table(rows: list[dict]) -> str:
    lines = [f"{'length':>8}  {'ours':12}{'stock':26}{'prefill':>8}{'hit':>8}{'decode':>8}"]
    for r in rows:
        hit = "-" if r["hit"] is None else f"{r['hit']:.1f}x"
        lines.append(f"{r['length']:8d}  {r['ours']:12}{r['stock']:26}{r['prefill']:7.1f}x{hit:>8}{r['decode']:7.1f}x")
    return "\n".join(lines)


def sliding_table(rows: list[dict]) -> str:
    lines = [f"one sliding layer, decode: {'length':>8}{'plan ms':>9}{'layer ms':>9}{'dense ms':>9}"]
    for r in rows:
        dense = "-" if r["dense_ms"] is None else f"{r['dense_ms']:.3f}"
        lines.append(f"{r['length']:35d}{r['plan_ms']:9.3f}{r['layer_ms']:9.3f}{dense:>9}")
    return "\n".join(lines)


def plot(results: list[Measurement], sliding: list[dict], path: Path) -> None:
    """Prefill, time to first token after a hit, decode, and one sliding layer; all axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7))
    panels = {
        "prefill, seconds": lambda m: m.prefill_seconds,
        "first token after a hit, seconds": lambda m: m.hit_seconds,
        "decode, tokens per second": lambda m: m.decode_rate,
    }
    for axes, (title, value) in zip(grid.flat, panels.items(), strict=True):
        for variant in dict.fromkeys(m.variant for m in results):
            rows = sorted((m for m in results if m.variant == variant), key=lambda m: m.length)
            rows = [m for m in rows if value(m) is not None]
            axes.plot([m.length for m in rows], [value(m) for m in rows], marker="o", label=variant)
        _decorate(axes, title)
    last = grid.flat[3]
    last.plot([r["length"] for r in sliding], [r["layer_ms"] for r in sliding], marker="o", label="this package")
    dense = [r for r in sliding if r["dense_ms"] is not None]
    last.plot([r["length"] for r in dense], [r["dense_ms"] for r in dense], marker="o", label="dense, as torch_native")
    _decorate(last, "decode, one sliding layer of the published size, ms")
    figure.suptitle("one request, CPU")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _decorate(axes, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("context length, tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
