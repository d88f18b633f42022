"""What doctor says of a checkpoint: its format, its MTP layers, whether a given machine can serve it."""

from sglang_step35.checkpoint.base import DamagedFile
from sglang_step35.cli.plan import checkpoint
from sglang_step35.cli.readme_command import MIB_PER_GIB, Device
from sglang_step35.config import ModelSpec
from sglang_step35.config_fields import ConfigError
from sglang_step35.planner import GIB, MIB, PlanError
from sglang_step35.planner.hardware import PORTABLE, Hardware, custom, host
from sglang_step35.planner.plan import Wish, make_plan
from sglang_step35.planner.stored import Stored

SHOWN = 4  # types of tensors

Fact = tuple[str, str | None]  # what is, and what to do where it is wrong


def look(path: str, devices: tuple[Device, ...], host_gib: float) -> list[Fact]:
    """The facts on the checkpoint at `path` for a machine of these CUDA devices, or of this memory without any."""
    try:
        spec, _, stored = checkpoint(path)
    except DamagedFile as error:
        return [(str(error), "download or copy the checkpoint again")]
    except (ConfigError, PlanError) as error:
        return [(str(error).removeprefix("--config "), "give the folder of a Step-3.5 checkpoint, or a GGUF file")]
    if stored is None:
        return [(f"{path}: config.json without weights", "download the *.safetensors files beside it")]
    return [(_format(stored), None), _mtp(spec, stored), _room(spec, stored, devices, host_gib)]


def _format(stored: Stored) -> str:
    files = f"{stored.files} file{'s' if stored.files > 1 else ''}"
    types = ", ".join(f"{name} {_size(count)}" for name, count in stored.types[:SHOWN])
    return f"{stored.format}, {stored.quantization}, {files}, {_size(stored.total)}: {types}"


def _mtp(spec: ModelSpec, stored: Stored) -> Fact:
    wanted = len(spec.mtp_layers)
    if not wanted:
        return "no MTP layers: it is served without drafts", None
    if stored.mtp == wanted:
        return f"{wanted} MTP layers: drafts with --speculative-num-steps {wanted}", None
    if stored.mtp == 0:
        mend = "leave --speculative-algorithm out, or use a file that kept them"
        return f"config.json names {wanted} MTP layers, the files hold none", mend
    return f"config.json names {wanted} MTP layers, the files hold {stored.mtp}", "download the missing files"


def _room(spec: ModelSpec, stored: Stored, devices: tuple[Device, ...], host_gib: float) -> Fact:
    machine, flags = _machine(stored, devices, host_gib)
    if machine.engine == PORTABLE and stored.cuda_only:
        return stored.cuda_only, "serve it on GPUs, or use another quantisation here"
    settings = f"python -m sglang_step35 plan --config {stored.path} {flags}"
    try:
        plan = make_plan(spec, machine, Wish(), stored)
    except PlanError as error:
        return str(error), f"find settings that do: {settings} --tp N"
    longest, most = plan.longest(1), spec.max_position
    where = f"{machine.label}: {_size(plan.resident)} of weights"
    if plan.best is None or not longest:
        return f"does not fit {where}", "use a smaller quantisation or more memory"
    served = f"up to {longest} tokens" if longest < most else f"{plan.best.concurrency(most)} requests of {most} tokens"
    return f"fits {where}, {served}; settings: {settings}", None


def _machine(stored: Stored, devices: tuple[Device, ...], host_gib: float) -> tuple[Hardware, str]:
    """The machine that would serve it, and how to name it to the planner."""
    if not devices or stored.quantization == "gguf":
        memory = round(host_gib, 1)
        return host(memory), f"--cpu-memory-gb {memory}"
    memory = round(min(device.memory for device in devices) / MIB_PER_GIB, 1)
    return custom(len(devices), memory, stored.quantization), f"--devices {len(devices)} --memory-gb {memory}"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
