"""A plan as text for people and as one JSON object for programs."""

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from sglang_step35.planner import GIB, MIB
from sglang_step35.planner.capacity import cached_prompts
from sglang_step35.planner.command import serve_line
from sglang_step35.planner.elsewhere import Judgement
from sglang_step35.planner.hardware import LLAMA_CPP, PORTABLE
from sglang_step35.planner.kv import DEFAULT_SWA_RATIO
from sglang_step35.planner.plan import Plan, Setup
from sglang_step35.planner.weights import GGUF_Q4_K_S_BYTES, active_parameters, parameters

CONTEXTS = (8192, 32768, 131072, 262144)  # tokens; rows of the capacity table

_PART_NAMES = {
    "embedding": "embedding",
    "attention": "attention",
    "dense": "dense feed-forward",
    "routed": "routed experts",
    "shared": "shared experts",
    "router": "routers",
    "norms": "norms",
    "head": "output head",
    "mtp": "MTP layers",
    "mtp_heads": "  a head of its own for each",
    "mtp_embeddings": "  an embedding of its own for each",
}


def gib(count: float) -> str:
    """Bytes as GiB with two decimals."""
    return f"{count / GIB:.2f}"


def _unit(largest: int) -> tuple[str, int]:
    """(name, bytes) to print sizes of up to `largest` bytes in."""
    return ("GiB", GIB) if largest >= GIB else ("MiB", MIB)


def _count(number: int) -> str:
    """Parameters in billions or millions."""
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"


def text(plan: Plan, model: str | None = None) -> str:
    """The whole report."""
    sections = [_head(plan), _weights(plan, published=model is None), _kv(plan), _memory(plan)]
    if plan.best:
        sections.append(_capacity(plan, plan.best))
    sections.append(_verdict(plan, model))
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _head(plan: Plan) -> list[str]:
    count, machine = parameters(plan.spec), plan.machine
    how = "on the CPU" if _on_cpu(plan) else f"tensor parallel {plan.tp}, expert parallel {plan.ep}"
    return [
        f"{machine.label}, {plan.quantization}, {how}",
        f"parameters: {_count(count.backbone)} backbone, {_count(active_parameters(plan.spec))} active per token, "
        f"{_count(count.mtp)} in {len(plan.spec.mtp_layers)} MTP layers, {_count(count.mtp_heads)} in their own heads",
    ]


def _weights(plan: Plan, published: bool) -> list[str]:
    unit, size = _unit(plan.resident)

    def row(name: str, count: int, remark: str = "") -> str:
        return f"  {name:<36}{count / size:>8.2f}{remark}"

    lines = [f"weights, {unit} {f'in {plan.stored.path}' if plan.stored else 'on each device'}"]
    for field in fields(plan.weights):
        if field.name.startswith("mtp") and not plan.layout.mtp_layers:
            continue
        remark = "  not counted" if field.name in ("mtp_heads", "mtp_embeddings") else ""
        lines.append(row(_PART_NAMES[field.name], getattr(plan.weights, field.name), remark))
    lines.append(row("total, embedding and head shared", plan.resident))
    if plan.layout.mtp_layers:
        lines.append(row("total if the MTP heads differ", plan.weights.checkpoint))
        lines.append(row("total with stock SGLang's copies", plan.weights.stock))
    if published:
        lines.append(f"  for comparison, the GGUF Q4_K_S file: {gib(GGUF_Q4_K_S_BYTES)} GiB (111.5 GB, given)")
    return lines


def _kv(plan: Plan) -> list[str]:
    layout = plan.layout
    lines = [
        "KV cache, bytes for a token on each device (bf16)",
        f"  {f'{layout.full_layers} full layers, kept for all tokens':<52}{layout.full_cell:>8}",
        f"  {f'{layout.sliding_layers} sliding layers, {layout.window} tokens + chunk':<52}"
        f"{layout.sliding_layers * layout.sliding_token:>8}",
    ]
    if layout.mtp_layers:
        share = f"{layout.mtp_layers} MTP layers, sliding too ({layout.mtp_share:.1%} of the sliding pool)"
        lines.append(f"  {share:<52}{layout.mtp_layers * layout.sliding_token:>8}")
    if layout.state:
        lines.append(f"  {'hidden states for the MTP layers, for the last tokens':<52}{layout.state:>8}")
    if layout.replication > 1:
        lines.append(f"  every KV head is held by {layout.replication} devices: more of them than KV heads")
    return lines


def _memory(plan: Plan) -> list[str]:
    """Where a device's memory goes in the advised setup, or in SGLang's own when there is none."""
    machine = plan.machine
    lines = ["memory of a device, GiB"]
    rows = [("in all", machine.memory)]
    if machine.system:
        rows.append(("operating system (estimate)", machine.system))
    runtime = "the server's processes (estimate)" if _on_cpu(plan) else "CUDA context, NCCL (estimate)"
    rows.append((runtime, machine.memory - machine.system - plan.free))
    rows.append(("weights", plan.resident))
    if plan.best:
        reserve = plan.best.reserve
        rest = "activations, and the host's" if _on_cpu(plan) else "activations, graphs: not touched"
        rows.append((rest, plan.free - plan.resident - plan.best.budget))
        rows.append(("KV cache", plan.best.budget))
        own = "SGLang's default" if plan.wish.mem_fraction_static is None else "given"
        how, most = "tightened" if reserve.tight else own, "at most " if _on_cpu(plan) else ""
        note = (
            f"  mem_fraction_static {reserve.mem_fraction_static:g} ({how}), chunk {most}{reserve.chunk} tokens"
            f"{'' if _on_cpu(plan) else f', graphs up to {reserve.graph_batch} requests'}"
        )
    else:
        rows.append(("left for KV after SGLang's reserve", plan.budget))
        note = ""
    lines += [f"  {name:<36}{gib(size):>8}" for name, size in rows]
    return [*lines, note] if note else lines


def _on_cpu(plan: Plan) -> bool:
    return plan.machine.engine == PORTABLE


def _capacity(plan: Plan, best: Setup) -> list[str]:
    """What the advised setup holds, and beside it SGLang's own where that starts."""
    stock = plan.stock
    heads = f"  {'':<34}{f'ratio {best.swa_ratio:g}':>12}"
    if stock:
        heads += f"{f'ratio {DEFAULT_SWA_RATIO:g} (default)':>22}"
    lines = ["pools: tokens for full layers and for sliding ones, by --swa-full-tokens-ratio", heads]

    def row(name: str, count: Callable[[Setup], int]) -> str:
        return f"  {name:<34}{count(best):>12}" + ("" if stock is None else f"{count(stock):>22}")

    lines.append(row("full tokens", lambda s: s.pools.full_tokens))
    lines.append(row("sliding tokens", lambda s: s.pools.sliding_tokens))
    lines.append(row(f"cached prompts beside {best.running}", lambda s: cached_prompts(s.pools, s.slots, s.running)))
    lines.append(f"  requests at once (at most {best.running})")
    for tokens in sorted({t for t in (*CONTEXTS, plan.context) if t <= plan.spec.max_position}):
        lines.append(row(f"  of {tokens} tokens", partial(Setup.concurrency, tokens=tokens)))
    return lines


def _verdict(plan: Plan, model: str | None) -> list[str]:
    requests = plan.wish.concurrency or 1
    asked = f"{requests} request{'s' if requests > 1 else ''} of {plan.context} tokens"
    notes = [plan.machine.note] if plan.machine.note else []
    if plan.stored and plan.spec.mtp_layers and not plan.stored.mtp:
        notes.append(f"{plan.stored.path} has no MTP layers: it is served without drafts")
    if plan.best is None:
        return [f"DOES NOT FIT: {asked}: {gib(plan.resident)} GiB of weights leave no room for a KV pool", *notes]
    if plan.fits:
        verdict = f"FITS: {asked}; at most {plan.best.concurrency(plan.context)} at once"
    elif longest := plan.longest(requests):
        verdict = f"DOES NOT FIT: {asked}; up to {longest} tokens do, the command takes {plan.served_context}"
    else:
        verdict = f"DOES NOT FIT: {asked}, nor so many shorter ones; the command below runs fewer at a time"
    return [verdict, *notes, "", serve_line(plan, model)]


def as_json(plan: Plan, model: str | None = None) -> dict[str, Any]:
    """Everything the text says, in bytes and tokens."""
    count = parameters(plan.spec)
    return {
        "machine": plan.machine.label,
        "engine": plan.machine.engine,
        "devices": plan.machine.devices,
        "quantization": plan.quantization,
        "tp": plan.tp,
        "ep": plan.ep,
        "parameters": {**asdict(count), "backbone": count.backbone, "checkpoint": count.checkpoint,
                       "active": active_parameters(plan.spec)},
        "weight_bytes": {**asdict(plan.weights), "resident": plan.resident, "stock": plan.weights.stock},
        "gguf_q4_k_s_bytes": GGUF_Q4_K_S_BYTES,
        "checkpoint": plan.stored and {"path": plan.stored.path, "bytes": plan.stored.total, "mtp": plan.stored.mtp},
        "kv": {**asdict(plan.layout), "full_cell": plan.layout.full_cell, "sliding_cell": plan.layout.sliding_cell},
        "memory_bytes": plan.machine.memory,
        "free_bytes": plan.free,
        "default_kv_budget_bytes": plan.budget,
        "setup": _setup_json(plan.best),
        "stock_setup": _setup_json(plan.stock),
        "context": plan.context,
        "concurrency": plan.wish.concurrency or 1,
        "fits": plan.fits,
        "requests_at_once": plan.best.concurrency(plan.context) if plan.best else 0,
        "longest_request": plan.longest(plan.wish.concurrency or 1),
        "note": plan.machine.note,
        "command": serve_line(plan, model) if plan.best else None,
    }  # fmt: skip


def _setup_json(setup: Setup | None) -> dict[str, Any] | None:
    if setup is None:
        return None
    return {
        "kv_budget_bytes": setup.budget,
        "max_running_requests": setup.running,
        "swa_full_tokens_ratio": setup.swa_ratio,
        **asdict(setup.reserve),
        **asdict(setup.pools),
    }


def judgement_text(judgement: Judgement) -> str:
    """The report for a machine SGLang does not serve."""
    rows = (("GGUF Q4_K_S (given)", judgement.weights), (f"KV cache of {judgement.context} tokens", judgement.kv))
    verdict = (
        "FITS" if judgement.fits_as_shipped else "FITS with the GPU limit raised" if judgement.fits else "DOES NOT FIT"
    )
    lines = [f"{judgement.machine.label}: llama.cpp, not SGLang", "", "memory, GiB"]
    lines += [f"  {name:<36}{gib(size):>8}" for name, size in rows]
    lines.append(f"  {'needed, buffers included (estimate)':<36}{gib(judgement.needed):>8}")
    if judgement.machine.wired:
        lines.append(f"  {'usable with the GPU limit raised':<36}{gib(judgement.usable):>8}")
    lines.append(f"  {'usable as shipped':<36}{gib(judgement.usable_as_shipped):>8}")
    return "\n".join([*lines, "", f"{verdict}: 1 request of {judgement.context} tokens", judgement.machine.note])


def judgement_json(judgement: Judgement) -> dict[str, Any]:
    return {
        "machine": judgement.machine.label,
        "engine": LLAMA_CPP,
        "quantization": "gguf",
        "context": judgement.context,
        "gguf_q4_k_s_bytes": judgement.weights,
        "kv_bytes": judgement.kv,
        "needed_bytes": judgement.needed,
        "usable_bytes": judgement.usable,
        "usable_as_shipped_bytes": judgement.usable_as_shipped,
        "fits": judgement.fits,
        "fits_as_shipped": judgement.fits_as_shipped,
        "note": judgement.machine.note,
        "command": None,
    }
