"""The `sglang serve` command of a plan."""

import shlex

from sglang_step35.planner.hardware import PORTABLE
from sglang_step35.planner.kv import DEFAULT_SWA_RATIO
from sglang_step35.planner.plan import EAGLE_RUNNING, Plan

# Where the published weights are. The official INT4 file is a GGUF, so a 4-bit safetensors checkpoint is the user's.
CHECKPOINTS = {
    "bf16": "stepfun-ai/Step-3.5-Flash",
    "fp8": "stepfun-ai/Step-3.5-Flash-FP8",
    "int8": "/path/to/Step-3.5-Flash-INT8",
    "int4": "/path/to/Step-3.5-Flash-INT4",
    "gguf": "/path/to/step-3.5-flash-Q4_K_S.gguf",
}


def serve_arguments(plan: Plan, model: str | None = None) -> list[str]:
    """The arguments of `sglang`; model: path or hub name, by default the published checkpoint."""
    flags = ["serve", "--model-path", model or CHECKPOINTS[plan.quantization], "--served-model-name", "step3p5-flash"]
    flags += ["--device", "cpu"] if plan.machine.engine == PORTABLE else _on_cuda(plan)
    flags += ["--tool-call-parser", "step3p5", "--reasoning-parser", "step3p5"]
    if plan.machine.attention:
        flags += ["--attention-backend", plan.machine.attention]
    if plan.layout.mtp_layers:
        flags += _speculative(plan.layout.mtp_layers)
    flags += _memory(plan)
    return [*flags, "--host", "0.0.0.0", "--port", "8000"]


def serve_line(plan: Plan, model: str | None = None) -> str:
    """The command on one line, quoted for a shell."""
    return shlex.join(["sglang", *serve_arguments(plan, model)])


def _on_cuda(plan: Plan) -> list[str]:
    """Parallel sizes and kernels. The checkpoint names its own method of quantisation."""
    flags = ["--tp-size", str(plan.tp)]
    if plan.ep > 1:
        flags += ["--ep-size", str(plan.ep)]
    if plan.quantization == "fp8":
        flags += ["--quantization", "fp8"]
    elif plan.quantization == "int4":
        # By default SGLang picks Marlin, which knows no SwiGLU clamp.
        flags += ["--moe-runner-backend", "triton"]
    return flags


def _speculative(steps: int) -> list[str]:
    return [
        "--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(steps), "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", str(steps + 1), "--enable-multi-layer-eagle",
    ]  # fmt: skip


def _memory(plan: Plan) -> list[str]:
    """Only what differs from SGLang's defaults."""
    flags = []
    if plan.served_context != plan.spec.max_position:
        flags += ["--context-length", str(plan.served_context)]
    if plan.wish.page_size != 1:
        flags += ["--page-size", str(plan.wish.page_size)]
    if plan.best is None:
        return flags
    setup = plan.best
    if setup.reserve.tight or setup.running != EAGLE_RUNNING or not plan.layout.mtp_layers:
        flags += ["--max-running-requests", str(setup.running)]
    if setup.swa_ratio != DEFAULT_SWA_RATIO:
        flags += ["--swa-full-tokens-ratio", f"{setup.swa_ratio:g}"]
    if plan.wish.mem_fraction_static is not None or setup.reserve.tight:
        flags += ["--mem-fraction-static", f"{setup.reserve.mem_fraction_static:g}"]
    if plan.machine.engine == PORTABLE:
        # SGLang takes mapped weights for free memory. Chunks: no larger ones by default (`platform/interleave.py`).
        flags += ["--max-total-tokens", str(setup.pools.full_tokens)]
    elif setup.reserve.tight:
        flags += ["--chunked-prefill-size", str(setup.reserve.chunk)]
    return flags
