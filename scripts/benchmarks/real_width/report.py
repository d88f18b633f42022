"""Table, picture and projection of the results."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from scripts.benchmarks.real_width.cells import CLIENTS, MODES, SLICES

MACHINES = (120, 256)  # GB/s of memory to project to
DENSE, LAYERS = 3, 45  # of the published model
COLUMNS = {"prefill tok/s": 14, "decode tok/s": 14, "answer tok/s": 14, "accept": 8, "MB/token": 10, "of bandwidth": 14}


def table(found: dict[str, Any]) -> Iterator[str]:
    if "bandwidth" in found:
        yield f"read bandwidth measured: {found['bandwidth']} GB/s"
    yield _row("", COLUMNS)
    for name, cell in found.items():
        if isinstance(cell, dict) and "decode" in cell:
            yield line(name, cell, found.get("bandwidth"))
    for name, ratio in ratios(found).items():
        yield f"{name:32}" + ", ".join(f"{what} {value:.2f}" for what, value in ratio.items())
    for form in SLICES:
        if f"layers/{form}" in found:
            yield from _slice(form, found[f"layers/{form}"])


def ratios(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By cell without its mode: medians over the turns of what each mode gave for another.

    adaptive: for the better of the others, which is the one that was better in median. llama.cpp: what the better of
    the others gave for it, and the prefill without MTP.
    """
    compared = {}
    for name in (name for name in found if name.startswith("ours/") and "/off/" in name):
        modes = {mode: found.get(name.replace("/off/", f"/{mode}/"), {}).get("turns") for mode in MODES}
        if not all(modes.values()):
            continue
        decode = {mode: turns["decode"] for mode, turns in modes.items()}
        ratio = _modes_compared(decode)
        whole = {mode: turns.get("whole") for mode, turns in modes.items()}
        if all(whole.values()):
            ratio |= {f"whole answers: {what}": value for what, value in _modes_compared(whole).items()}
        if modes["off"]["prefill"]:
            ratio |= {"prefill, MTP over off": _over(modes["mtp"]["prefill"], modes["off"]["prefill"])}
        llama = found.get(name.replace("ours/", "llama.cpp/"), {}).get("turns")
        if llama and len(llama["decode"]) == len(decode["off"]):  # measured in the same turns
            ratio |= {"over llama.cpp": _over(decode[_better(decode)], llama["decode"])}
            ratio |= {"prefill over llama.cpp": _over(modes["off"]["prefill"], llama["prefill"])}
        compared[name.replace("/off/", "/")] = ratio
    return compared


def _modes_compared(rates: dict[str, list[float]]) -> dict[str, float]:
    better = rates[_better(rates)]
    return {
        "MTP over off": _over(rates["mtp"], rates["off"]),
        "adaptive over the better": _over(rates["adaptive"], better),
    }


def _better(rates: dict[str, list[float]]) -> str:
    return max(("off", "mtp"), key=lambda mode: median(rates[mode]))


def _over(these: list[float], those: list[float]) -> float:
    return round(median(a / b for a, b in zip(these, those, strict=True)), 3)


def line(name: str, cell: dict[str, Any], bandwidth: float | None) -> str:
    prefill, whole, accept, read = (_number(cell.get(key)) for key in ("prefill", "whole", "accept", "mb_per_token"))
    used = share(cell.get("mb_per_token"), cell["decode"], bandwidth)
    return _row(name, (prefill, f"{cell['decode']:.1f}", whole, accept, read, used))


def _row(name: str, values: Iterable[str]) -> str:
    return f"{name:32}" + "".join(f"{value:>{width}}" for value, width in zip(values, COLUMNS.values(), strict=True))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def share(megabytes: float | None, rate: float, bandwidth: float | None) -> str:
    return "-" if megabytes is None or bandwidth is None else f"{megabytes * rate / 1000 / bandwidth:.2f}"


def _slice(form: str, measured: dict[str, Any]) -> Iterator[str]:
    """measured: {rows: {"ms": [..], "mb": [..], "bandwidth": GB/s}} of the dense and the expert layer and the head."""
    for rows, step in measured.items():
        for part, ms, mb in zip(("dense layer", "expert layer", "head"), step["ms"], step["mb"], strict=True):
            used = share(mb, 1000 / ms, step["bandwidth"])
            yield f"{form} {part}, {rows} rows: {ms:.2f} ms, {mb:.1f} MB, {used} of the bandwidth"
    for machine in MACHINES if "1" in measured else ():
        ms, rate = project(measured["1"], measured["1"]["bandwidth"], machine)
        yield (
            f"{form} PROJECTED, not measured: {LAYERS} layers at {machine} GB/s: {ms:.0f} ms a token, {rate:.1f} tok/s "
            f"without speculation"
        )


def project(step: dict[str, list[float]], here: float, there: float) -> tuple[float, float]:
    """(milliseconds a token, tokens per second) of the published model where every part keeps its share of bandwidth.

    step: ms of the dense layer, the expert layer and the head. here, there: GB/s. Full and sliding layers count alike.
    """
    dense, experts, head = step["ms"]
    ms = (DENSE * dense + (LAYERS - DENSE) * experts + head) * here / there
    return ms, 1000 / ms


def plot(found: dict[str, Any], path: Path) -> None:
    """Decode rates at the shorter prompt, a panel for each number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, row = pyplot.subplots(1, len(CLIENTS), figsize=(4 * len(CLIENTS), 4.5), squeeze=False)
    for axes, clients in zip(row[0], CLIENTS, strict=True):
        end = f"/c{clients}/p512"
        rates = {name.removesuffix(end): cell["decode"] for name, cell in found.items() if name.endswith(end)}
        bars = axes.barh(list(rates), list(rates.values()))
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{clients} clients" if clients > 1 else "1 client")
        axes.set_xlabel("tokens per second, all clients")
        axes.tick_params(labelsize=8)
    figure.suptitle("0.9B checkpoint, prompts of 512 tokens, decode")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
