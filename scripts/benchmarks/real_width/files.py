"""The benchmark's files, written once into a folder: the 0.9B checkpoint and slices of the published widths."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import gguf

from scripts.benchmarks.real_width import checkpoint, drafted

INT4, FP8, BF16 = "int4", "fp8", "bf16"
MIB = 1 << 20


def drafted_file(form: str, folder: Path) -> Path:
    """The 0.9B checkpoint: safetensors in bf16 or with experts in FP8, or GGUF in the type of this name."""
    config = drafted.fields()
    if form in (BF16, FP8):
        write = checkpoint.write_bf16 if form == BF16 else checkpoint.write_fp8
        return written(folder / f"0.9B-{form}", lambda target: write(target, config, list(drafted.entries(config))))
    kind = gguf.GGMLQuantizationType[form]
    write = lambda target: checkpoint.write_gguf(target, config, kind, list(drafted.entries(config)))
    return written(folder / f"0.9B-{form}.gguf", write)


def slice_file(form: str, folder: Path, fields: dict) -> Path:
    """Layers of the published widths: INT4 safetensors, or GGUF in the type of this name."""
    shape = f"{fields['num_hidden_layers']}x{fields['vocab_size']}"
    if form == INT4:
        return written(folder / f"{shape}-{INT4}", lambda target: checkpoint.write_int4(target, fields))
    kind, entries = gguf.GGMLQuantizationType[form], list(checkpoint.matrices(fields))
    return written(folder / f"{shape}-{form}.gguf", lambda target: checkpoint.write_gguf(target, fields, kind, entries))


def written(target: Path, write: Callable[[Path], None]) -> Path:
    """The target, written unless it is there; folders are those without a suffix. An interrupted write leaves none."""
    if target.exists():
        return target
    partial, started = target.with_name(f"partial-{target.name}"), time.monotonic()
    if target.suffix != ".gguf":
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    write(partial)
    partial.rename(target)
    print(f"wrote {target.name}: {size(target) / MIB:.0f} MiB in {time.monotonic() - started:.0f} s", flush=True)
    return target


def size(target: Path) -> int:
    return sum(file.stat().st_size for file in files_of(target))


def files_of(target: Path) -> list[Path]:
    return sorted(target.glob("*.safetensors")) if target.is_dir() else [target]
