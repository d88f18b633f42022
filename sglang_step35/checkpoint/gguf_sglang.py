"""What SGLang asks a GGUF file besides its weights and config: architecture, end tokens, tokenizer.

Functions behind `hooks/` ("around" SGLang's own, which come first and serve every other architecture).
"""

from sglang_step35.checkpoint.gguf import GGUFFiles
from sglang_step35.checkpoint.gguf_config import token_fields
from sglang_step35.checkpoint.gguf_file import open_gguf
from sglang_step35.checkpoint.gguf_names import ARCHITECTURE


def read_architecture(_stock, gguf_path: str) -> str | None:
    """`general.architecture` of any GGUF file. Raises DamagedFile where stock would answer None."""
    return open_gguf(gguf_path).get("general.architecture")


def generation_config(stock, gguf_path: str):
    """The end tokens of the config; llama.cpp writes no sampling defaults for this model."""
    if not _is_ours(gguf_path):
        return stock(gguf_path)
    from transformers import GenerationConfig

    return GenerationConfig(**token_fields(open_gguf(gguf_path)))


def tokenizer(stock, gguf_path: str, **options):
    """The file's own tokenizer, see `gguf_tokenizer.py`."""
    if not _is_ours(gguf_path):
        return stock(gguf_path, **options)
    from sglang_step35.checkpoint.gguf_tokenizer import build_tokenizer

    return build_tokenizer(GGUFFiles(gguf_path).metadata(), **options)


def _is_ours(gguf_path: str) -> bool:
    return open_gguf(gguf_path).get("general.architecture") == ARCHITECTURE
