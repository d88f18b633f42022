"""One HTML file that compares runs side by side and needs nothing else: styles and plots are inside."""

import base64
from collections.abc import Sequence
from html import escape

from sglang_step35.bench.plots import overview, positions
from sglang_step35.bench.stats import Cell, Run, Spread, workloads_of
from sglang_step35.bench.table import number, ratio
from sglang_step35.bench.workloads import WORKLOADS

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 1250px; margin: 2em auto; padding: 0 1em; color: #222;
  background: #fff }
table { border-collapse: collapse; margin: .5em 0 1.5em; font-variant-numeric: tabular-nums }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd }
th { font-weight: 600; background: #f5f5f5 }
th.name, td.name { text-align: left }
tr.group td { border-top: 2px solid #bbb }
td.bad { color: #b00020; font-weight: 600 }
td.up { color: #1a7f37 } td.down { color: #b35900 }
img { max-width: 100% }
p.note { color: #555 }
"""
HEADERS = (
    "clients", "run", "tok/s", "ratio", "TTFT ms<br>p50 / p95 / p99", "TPOT ms<br>p50 / p95 / p99",
    "latency ms<br>p50 / p95 / p99", "accept<br>length", "accepted<br>by position", "cache<br>hits", "requests",
    "errors",
)  # fmt: skip
NOTES = (
    "tok/s: output tokens of all requests over the wall time of the cell. ratio: to the first run. "
    "TTFT: until the first visible token. TPOT: time for each token after the first. "
    "accept length: tokens a verification round yields, the target's own among them. "
    "accepted by position: share of rounds whose first, second, third draft was accepted. "
    "cache hits: share of prompt tokens that came from the prefix cache. “-”: the endpoint does not tell. "
    "* tokens were counted as chunks, because the endpoint sent no usage."
)


def triple(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.p50:.1f} / {spread.p95:.1f} / {spread.p99:.1f}"


def errors(cell: Cell) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(cell.errors.items())) or "0"


def _row(run: Run, cell: Cell, base: Cell | None, first: bool) -> str:
    times = ratio(cell, base)
    tone = "" if times is None or cell is base else "up" if times >= 1 else "down"
    shares = " ".join(f"{share:.2f}" for share in cell.acceptance or ()) or "-"
    hits = "-" if cell.cache_hit_rate is None else f"{100 * cell.cache_hit_rate:.0f} %"
    columns = (
        ("", str(cell.concurrency) if first else ""),
        ("name", escape(run.label)),
        ("", number(cell.tokens_per_second) + ("" if cell.tokens_counted else "*")),
        (tone, number(times, 2)),
        ("", triple(cell.ttft)),
        ("", triple(cell.tpot)),
        ("", triple(cell.latency)),
        ("", number(cell.accept_length, 2)),
        ("", shares),
        ("", hits),
        ("", str(cell.requests)),
        ("bad" if cell.failed else "", escape(errors(cell))),
    )
    cells = "".join(f'<td class="{tone}">{text}</td>' for tone, text in columns)
    return f'<tr class="{"group" if first else ""}">{cells}</tr>'


def _section(runs: Sequence[Run], workload: str) -> str:
    found = [(run, cell) for run in runs for cell in run.cells if cell.workload == workload]
    rows = []
    for level in sorted({cell.concurrency for _, cell in found}):
        group = [(run, cell) for run, cell in found if cell.concurrency == level]
        base = group[0][1] if group[0][0] is runs[0] else None
        rows += [_row(run, cell, base, first=i == 0) for i, (run, cell) in enumerate(group)]
    about = WORKLOADS[workload].about if workload in WORKLOADS else ""
    names = "".join(f'<th class="{"name" if h == "run" else ""}">{h}</th>' for h in HEADERS)
    heading = f"<h2>{escape(workload)}</h2><p class='note'>{escape(about)}</p>"
    return f"{heading}<table><thead><tr>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _runs(runs: Sequence[Run]) -> str:
    """What was compared, and with which settings."""
    rows = ""
    for run in runs:
        settings = ", ".join(f"{key} {value}" for key, value in run.settings.items())
        texts = (run.label, run.model, run.engine, run.started, settings)
        rows += "<tr>" + "".join(f'<td class="name">{escape(str(text))}</td>' for text in texts) + "</tr>"
    heads = "".join(f'<th class="name">{h}</th>' for h in ("run", "model", "engine", "started", "settings"))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _image(png: bytes | None, about: str) -> str:
    if png is None:
        return ""
    return f'<p><img alt="{about}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def html(runs: Sequence[Run]) -> str:
    title = "Serving: " + " / ".join(run.label for run in runs)
    sections = "".join(_section(runs, workload) for workload in workloads_of(runs))
    plots = _image(overview(runs), "all workloads") + _image(positions(runs), "acceptance by draft position")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{_runs(runs)}{plots}"
        f"<p class='note'>{NOTES}</p>{sections}</body></html>\n"
    )
