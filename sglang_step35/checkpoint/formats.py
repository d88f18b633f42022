"""Which format a checkpoint has."""

from sglang_step35.checkpoint.base import CheckpointFiles
from sglang_step35.checkpoint.gguf import GGUFFiles, is_gguf
from sglang_step35.checkpoint.safetensors import SafetensorsFiles


def open_files(source: str | None) -> CheckpointFiles:
    """The files behind `--model-path`: a GGUF file, a directory or a model id; None or an unknown one has no files."""
    if source is not None and is_gguf(source):
        return GGUFFiles(source)
    return SafetensorsFiles(source)
