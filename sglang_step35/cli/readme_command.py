"""What the README's serving command would do on a machine. Pure: the machine is given.

The command asks for `--tp-size 8` and bf16 weights; doctor tells how far that goes here and what to use instead.
"""

from dataclasses import dataclass

from sglang_step35.cli.plan import load
from sglang_step35.planner import GIB, PlanError
from sglang_step35.planner.hardware import custom, host
from sglang_step35.planner.kv import DEFAULT_SWA_RATIO
from sglang_step35.planner.plan import Plan, Wish, make_plan

TP_SIZE = 8
CPU_CHOICES = ("bf16", "int8", "gguf", "int4")  # the largest that fits is advised
MIB_PER_GIB = 1024


@dataclass(frozen=True)
class Device:
    """One CUDA device; memory in MiB as nvidia-smi reports it, capability as (major, minor)."""

    name: str
    memory: int
    capability: tuple[int, int]


def outcome(devices: tuple[Device, ...], host_gib: float) -> list[str]:
    """Lines for the report: what the command does here, then what does better where it fails."""
    if not devices:
        return _on_cpu(host_gib)
    memory = min(device.memory for device in devices) / MIB_PER_GIB
    if len(devices) < TP_SIZE:
        first = f"the README's command asks for {TP_SIZE} GPUs (--tp-size {TP_SIZE}), here are {len(devices)}"
        return [first, _advice(len(devices), memory), *_attention(devices)]
    plan = _plan(TP_SIZE, memory, "bf16", DEFAULT_SWA_RATIO)
    if plan is None or plan.best is None:
        first = f"the README's command runs out of memory: its bf16 weights leave no room for KV in {memory:.0f} GiB"
        return [first, _advice(len(devices), memory), *_attention(devices)]
    requests = plan.best.concurrency(plan.context)
    text = f"the README's command starts: {plan.resident / GIB:.0f} GiB of weights on each GPU, "
    text += f"{requests} requests of {plan.context} tokens at once" if requests else _short(plan)
    return [text, _advice(TP_SIZE, memory), *_attention(devices)]


def _on_cpu(host_gib: float) -> list[str]:
    """The portable platform serves the model where a quantised file fits the memory."""
    spec, _ = load(None)
    plans = {name: make_plan(spec, host(host_gib), Wish(quantization=name)) for name in CPU_CHOICES}
    bf16 = plans["bf16"]
    verdict = "fits" if bf16.longest(1) else "does not fit"
    first = f"the README's command would load {bf16.resident / GIB:.0f} GiB of bf16 weights into {host_gib:.0f} GiB: "
    for name, plan in plans.items():
        if plan.longest(1):
            size = f"--cpu-memory-gb {host_gib:.0f} --quantization {name}"
            text = f"settings for this machine, up to {plan.longest(1)} tokens: python -m sglang_step35 plan {size}"
            return [first + verdict, text]
    text = "for this machine: scripts/quickstart.sh, or scripts/serve.sh nano-cpu (the packaged nano checkpoint)"
    return [first + verdict, text]


def _advice(count: int, memory: float) -> str:
    """The first quantization with which this machine serves one request, as a call of the planner."""
    for quantization in ("bf16", "fp8", "int4"):
        plan = _plan(count, memory, quantization, None)
        if plan is not None and plan.best is not None and plan.longest(1):
            size = f"--devices {count} --memory-gb {memory:.1f} --quantization {quantization}"
            return f"settings for this machine: python -m sglang_step35 plan {size}"
    return f"no 4-bit checkpoint fits {count} x {memory:.0f} GiB either: see python -m sglang_step35 plan"


def _plan(count: int, memory: float, quantization: str, swa_ratio: float | None) -> Plan | None:
    """None where the planner refuses, e.g. a number of GPUs that the heads cannot be split over."""
    spec, _ = load(None)
    try:
        return make_plan(spec, custom(count, memory, quantization), Wish(swa_ratio=swa_ratio))
    except PlanError:
        return None


def _short(plan: Plan) -> str:
    return f"one request of at most {plan.longest(1)} tokens"


def _attention(devices: tuple[Device, ...]) -> list[str]:
    """GPUs on which SGLang's own choice of attention does not run this model with MTP."""
    major = min(device.capability[0] for device in devices)
    if major == 12:
        return ["add --attention-backend flashinfer: SGLang would pick fa4, which reads no paged KV on SM 12.x"]
    return []
