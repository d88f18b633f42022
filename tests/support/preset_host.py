"""`python tests/support/preset_host.py PRESET ...`: what SGLang makes of presets, resolved in full, as one JSON object.

A process of its own, because the platform is chosen once a process. SGLang keeps the facts of a machine in one place
that can be overridden, so the presets for GPUs resolve without any: argument handlers, model overrides, our hooks and
the choice of the worker are the ones a server runs.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

from sglang_step35.assets import CONFIGS, NANO

NONE_OF_THESE = dict.fromkeys(
    ("is_hip", "is_npu", "is_xpu", "is_musa", "is_mps", "is_sm90", "is_sm100", "is_sm100_or_sm110", "is_sm110",
     "is_sm120", "is_blackwell", "is_hopper_with_cuda_12_3", "has_amx"), False
)  # fmt: skip
CUDA = {**NONE_OF_THESE, "is_cuda": True, "has_flashinfer": True}
HOPPER = {**CUDA, "is_sm90": True, "is_hopper_with_cuda_12_3": True, "device_sm": 90, "device_capability": (9, 0)}
GB10 = {**CUDA, "is_sm120": True, "is_blackwell": True, "device_sm": 121, "device_capability": (12, 1)}
# Facts of the machine a preset is for, and MiB of one device. None: the portable platform, this machine's facts.
MACHINES = {
    "bf16-8gpu": (HOPPER, 81_559),
    "fp8-8gpu": (HOPPER, 81_559),
    "fp8-4xh200": (HOPPER, 143_771),
    "int4-dgx-spark": (GB10, 122_070),
    "nano-cpu": (None, 0),
    "gguf-cpu": (None, 0),
    "int4-cpu": (None, 0),
}
FIELDS = (
    "attention_backend", "prefill_attention_backend", "decode_attention_backend", "speculative_num_steps",
    "speculative_num_draft_tokens", "enable_multi_layer_eagle", "moe_runner_backend", "page_size", "device",
    "sleep_on_idle", "disable_overlap_schedule",
)  # fmt: skip


def machine(preset: str) -> tuple[dict | None, int]:
    return MACHINES[preset.removesuffix("-no-mtp")]


def choose_cuda_platform() -> None:
    """Let SGLang believe in CUDA before the plug-in looks at the platform."""
    import sglang.srt.platforms as platforms

    platforms._current_platform = platforms.CudaSRTPlatform()


def resolve(preset: str, model: Path) -> dict:
    """The fields as resolved, what became of the preset's own values, and the worker's module and name."""
    from sglang.srt.arg_groups import memory_hook
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    facts, memory = machine(preset)
    path = CONFIGS / f"{preset}.yaml"
    flags = ["--config", str(path), "--model-path", str(model)]
    if facts:
        flags += ["--device", "cuda"]
        memory_hook.get_device_memory_capacity = lambda device: memory
    with override_platform(**facts or {}):
        args = prepare_server_args(flags)
        args.resolve_once()
        view = resolved_view(args)
        worker = None
        if view.speculative_algorithm is not None:
            worker = SpeculativeAlgorithm.from_string(view.speculative_algorithm).create_worker(args)
    own = {key.replace("-", "_") for key in yaml.safe_load(path.read_text())} - {"model_path"}
    return {
        **{field: getattr(view, field) for field in FIELDS},
        "own": {name: getattr(view, name) for name in sorted(own)},
        "worker": worker and f"{worker.__module__}.{worker.__name__}",
    }


def main(presets: list[str]) -> None:
    if machine(presets[0])[0]:
        choose_cuda_platform()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        shutil.copy(CONFIGS / "step-3.5-flash.config.json", model / "config.json")
        found = {preset: resolve(preset, model if machine(preset)[0] else NANO) for preset in presets}
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a GPU's own facts would mix with the given ones
    main(sys.argv[1:])
