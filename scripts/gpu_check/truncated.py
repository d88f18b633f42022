"""The step `checkpoint`: how many layers, then the file."""

import shutil
import time

from scripts.gpu_check.checkpoint import write
from scripts.gpu_check.echo import Echo, make_echo
from scripts.gpu_check.layers import file_bytes, fitting, truncated
from scripts.gpu_check.options import Refused, Setting
from sglang_step35.assets import NANO
from sglang_step35.config import parse_config
from sglang_step35.planner import PlanError

SPARE_DISK = 4 << 30  # bytes that stay free


def echo_of(setting: Setting) -> Echo:
    """What the checkpoint of the step before says."""
    return make_echo(setting.need("checkpoint")["config"]["vocab_size"], NANO / "tokenizer.json")


def layers(setting: Setting) -> int:
    if setting.moe_layers is not None:
        return setting.moe_layers
    if setting.tiny:
        return 2
    memory = setting.need("machine")["gpu"]["memory_mib"] / 1024
    disk = shutil.disk_usage(setting.out).free - SPARE_DISK
    return fitting(memory, disk, setting.context, max(setting.concurrency))


def run(setting: Setting) -> dict:
    """Writes OUT/checkpoint anew."""
    setting.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(setting.checkpoint, ignore_errors=True)
    try:
        count = layers(setting)
        fields = truncated(count, tiny=setting.tiny)
    except PlanError as error:
        raise Refused(str(error)) from None
    echo = make_echo(fields["vocab_size"], NANO / "tokenizer.json")
    size, start = file_bytes(parse_config(fields)), time.monotonic()
    print(f"{count} layers of experts, {size / 1e9:.1f} GB, to {setting.checkpoint}", flush=True)
    write(setting.checkpoint, fields, echo)
    seconds = round(time.monotonic() - start, 1)
    print(f"written in {seconds} s; accept length by design {echo.accept_length():.3f}")
    return {
        "moe_layers": count,
        "bytes": size,
        "seconds": seconds,
        "accept_length": round(echo.accept_length(), 3),
        "config": fields,
    }
