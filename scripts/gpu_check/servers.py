"""The servers the steps start: the planner's own serving line for this GPU, or the tiny checkpoint on a CPU."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.gpu_check.layers import plan_of
from scripts.gpu_check.options import Setting
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, Server, ServerFailed, ServerPool
from sglang_step35.planner.command import serve_arguments
from sglang_step35.planner.plan import Plan

MODEL = "step3p5-flash"
KINDS = {
    "mtp": "this package, three MTP layers",
    "off": "this package, no speculation",
    "adaptive": "this package, adaptive draft depth",
    "flashinfer": "this package, three MTP layers, FlashInfer attention",
    "stock": "SGLang without this package, multi-layer EAGLE",
}
MORE = {"adaptive": ("--speculative-adaptive",), "flashinfer": ("--attention-backend", "flashinfer")}
# SGLang loads the plug-ins this names; one that does not exist leaves stock code alone.
NO_PLUGINS = {"SGLANG_PLUGINS": "none"}
ERROR = re.compile(r"\b\w*(?:Error|Exception|SystemExit)\b: ?(.*)")
LONGEST_REASON = 160


def plan_for(setting: Setting, kind: str) -> Plan:
    """The planner's answer for the GPU of the machine step and the checkpoint that was written."""
    memory = setting.need("machine")["gpu"]["memory_mib"] / 1024
    fields = setting.need("checkpoint")["config"]
    return plan_of(fields, memory, setting.context, max(setting.concurrency), mtp=kind != "off")


def arguments(setting: Setting, kind: str) -> tuple[str, ...]:
    """Arguments of `sglang serve`, host and port aside."""
    setting.need("checkpoint")
    path = str(setting.checkpoint)
    if setting.device == "cpu":
        base = (*NANO_ARGS, "--model-path", path, "--served-model-name", MODEL)
        base += MTP_ARGS if kind != "off" else ()
    else:
        base = tuple(serve_arguments(plan_for(setting, kind), path)[1:])
    return (*base, "--dtype", "bfloat16", "--enable-metrics", "--enable-cache-report", *MORE.get(kind, ()))


@contextmanager
def served(*args: str, **env: str) -> Iterator[Server]:
    """One server for as long as the block runs. Raises ServerFailed."""
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder), alive=1)
        try:
            yield pool.get(*args, **env)
        finally:
            pool.stop_all()


def served_kind(setting: Setting, kind: str):
    return served(*arguments(setting, kind), **(NO_PLUGINS if kind == "stock" else {}))


def reason(failure: ServerFailed) -> str:
    """The last error of the log's end, on one line."""
    lines = str(failure).splitlines()
    errors = [found[0] for line in lines if (found := ERROR.search(line))]
    return (errors or lines[:1])[-1][:LONGEST_REASON]
