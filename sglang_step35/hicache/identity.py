"""Which server wrote a page of KV: the digest that stands in the name of every file."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from sglang.srt.runtime_context import get_memory, get_model, get_schedule, get_spec

from sglang_step35.checkpoint.formats import open_files

FORMAT = 1  # of the files; a new one finds none of the old
_updates = 0
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of each weight file, evenly spaced: the whole would be read for minutes


def note_weight_update() -> None:
    """The weights of this process are no longer those of its checkpoint."""
    global _updates
    _updates += 1


def weight_updates() -> int:
    """How often so far; with any, `server_identity` is no longer true."""
    return _updates


def server_identity() -> str:
    """32 hex digits: the same only for servers whose pages hold the same numbers in the same order.

    Checkpoint (config.json, weight files), dtypes, quantisation, page size and order in host memory, MTP depth.
    """
    model, memory, spec = get_model(), get_memory(), get_spec()
    files = open_files(model.model_path).files()
    facts = {
        "format": FORMAT,
        "config": config_digest(files),
        "overrides": model.json_model_override_args,
        "weights": [weight_file_facts(file) for file in files] or [model.model_path, model.revision],
        "load": [model.load_format, model.dtype, model.quantization, model.kv_cache_dtype],
        "page": [get_schedule().page_size, memory.hicache_mem_layout],
        "mtp_layers": spec.speculative_num_steps if spec.speculative_algorithm else 0,
    }
    return digest_of([json.dumps(facts, sort_keys=True, default=str).encode()])


def config_digest(files: list[Path]) -> str | None:
    """Digest of the config.json beside the weight files; None where these hold it (GGUF)."""
    config = files[0].with_name("config.json") if files else None
    return digest_of([config.read_bytes()]) if config and config.is_file() else None


def weight_file_facts(file: Path) -> list:
    """Name, size, time of the last change, and a digest of samples: what tells weights apart without reading them all.

    The time also tells apart weights that differ in few places; a copy that does not keep it is another checkpoint.
    """
    stat = file.stat()
    with file.open("rb") as stream:
        return [file.name, stat.st_size, stat.st_mtime_ns, digest_of(_samples(stream, stat.st_size))]


def _samples(stream, size: int) -> Iterable[bytes]:
    for index in range(_SAMPLES):
        stream.seek(size * index // _SAMPLES)
        yield stream.read(_SAMPLE_BYTES)


def digest_of(parts: Iterable) -> str:
    """32 hex digits over all bytes of `parts`."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()
