"""One table, one JSON line and one picture from what the steps left. Pure, apart from `run`."""

import json
from typing import Any

from scripts.gpu_check.options import Setting
from scripts.gpu_check.profile import line
from scripts.gpu_check.suite import PARTS
from sglang_step35.bench.stats import Run, run_from_json
from sglang_step35.bench.table import table

BENCHES = ("bench-off", "bench-mtp", "bench-adaptive", "bench-flashinfer", "bench-stock")  # ratios are to the first
PROFILES = ("profile", "profile-adaptive")
STEPS = ("machine", *PARTS, "checkpoint", *BENCHES, "accept", *PROFILES, "memory")
PARTS_OF_ROUND = ("verify", "mtp", "other", "gap")

Results = dict[str, Any]  # step -> what it saved; steps that did not run are absent


def runs_of(results: Results) -> list[Run]:
    return [run_from_json(results[name]["run"]) for name in BENCHES if "run" in results.get(name, {})]


def text(results: Results) -> str:
    """Everything for people."""
    lines = [_machine(results), _checkpoint(results), *_tests(results)]
    if runs := runs_of(results):
        lines += ["", table(runs)]
    lines += [f"{n}: does not start: {results[n]['no_start']}" for n in BENCHES if "no_start" in results.get(n, {})]
    if accept := results.get("accept"):
        for name in ("truncated", "nano"):
            part = accept[name]
            lines.append(f"accept length, {name}: {part['accept_length']}, offline loop {part['offline']}")
    lines += [f"round, {line(row)}" for row in _rounds(results)]
    if captured := results.get("profile-adaptive", {}).get("captured"):
        lines.append("verify graphs, GB: " + ", ".join(f"{width} tokens {taken}" for width, taken in captured.items()))
    for figure in results.get("memory", {}).get("figures", ()):
        planned = "" if figure["planned"] is None else f", planned {figure['planned']:.2f}"
        taken = "-" if figure["taken"] is None else f"{figure['taken']:.2f}"
        lines.append(f"memory, {figure['name']}: {taken} {figure['unit']}{planned}")
    if absent := [name for name in STEPS if name not in results]:
        lines += ["", f"not run: {', '.join(absent)}"]
    return "\n".join(line for line in lines if line is not None)


def _rounds(results: Results) -> list[dict]:
    return [row for name in PROFILES for row in results.get(name, {}).get("rounds", ())]


def _machine(results: Results) -> str | None:
    if (machine := results.get("machine")) is None:
        return None
    gpu = machine["gpu"]
    name = f"{gpu['name']}, {gpu['memory_mib']} MiB, driver {gpu['driver']}" if gpu else "no GPU"
    return f"{machine['date']}: {name}, {machine['cpus']} CPUs, {machine['host_memory_gib']} GiB"


def _checkpoint(results: Results) -> str | None:
    if (found := results.get("checkpoint")) is None:
        return None
    size = found["bytes"] / 1e9
    promised = found["accept_length"]
    return f"checkpoint: {found['moe_layers']} layers of experts, {size:.1f} GB, accept length by design {promised:.2f}"


def _tests(results: Results) -> list[str]:
    found = [name for name in PARTS if name in results]
    return [f"{name}: {', '.join(f'{k} {v}' for k, v in results[name].items())}" for name in found]


def summary(results: Results) -> dict:
    """The JSON line."""
    cells = [
        {"run": run.label, "prompt": cell.workload, "concurrency": cell.concurrency}
        | {key: getattr(cell, key) for key in ("tokens_per_second", "accept_length", "failed")}
        for run in runs_of(results)
        for cell in run.cells
    ]
    kept = {name: results[name] for name in (*PARTS, "accept", *PROFILES, "memory") if name in results}
    machine, checkpoint = results.get("machine", {}), results.get("checkpoint", {})
    return {
        "bench": "gpu_check",
        "machine": {key: machine.get(key) for key in ("date", "gpu", "torch", "device")},
        "checkpoint": {key: checkpoint.get(key) for key in ("moe_layers", "bytes", "accept_length")},
        "results": cells,
        "no_start": {name: results[name]["no_start"] for name in BENCHES if "no_start" in results.get(name, {})},
        **kept,
        "not_run": [name for name in STEPS if name not in results],
    }


def picture(results: Results) -> bytes | None:
    """Tokens per second and accept length of all servers, and a round's parts; None where neither step ran."""
    import io

    from sglang_step35.bench import plots

    rounds = _rounds(results)
    if not (runs := runs_of(results)):
        return None
    if not rounds:
        return plots.overview(runs)
    overview = plots.pyplot.imread(io.BytesIO(plots.overview(runs)))
    height, width = overview.shape[:2]
    figure, (left, right) = plots.pyplot.subplots(
        1, 2, figsize=(width / 100 + 3.5, height / 100), width_ratios=(width / 100, 2.5)
    )
    left.imshow(overview)
    left.axis("off")
    bottoms = [0.0] * len(rounds)
    for i, name in enumerate(PARTS_OF_ROUND):
        values = [row[name] for row in rounds]
        places = [f"{row['concurrency']}" + (f"\n{row['width']}" if "width" in row else "") for row in rounds]
        right.bar(places, values, bottom=bottoms, label=name, color=plots.COLORS[i])
        bottoms = [a + b for a, b in zip(bottoms, values, strict=True)]
    right.set_title(f"a round with MTP, ms ({rounds[0]['source']})", fontsize=10)
    right.set_xlabel("concurrent requests; below them tokens verified, where adaptive", fontsize=8)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncol=2, fontsize=8, frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    plots.pyplot.close(figure)
    return buffer.getvalue()


def run(setting: Setting) -> dict:
    results = {name: found for name in STEPS if (found := setting.load(name)) is not None}
    print(text(results))
    if image := picture(results):
        (setting.out / "report.png").write_bytes(image)
        print(f"picture: {setting.out / 'report.png'}")
    found = summary(results)
    print(json.dumps(found))
    return found
