"""What a process of SGLang has registered once it called load_plugins; nothing of ours is imported here."""

from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.plugins import load_plugins


def flashinfer_maker() -> str:
    """The module of the function that makes the attention backend `flashinfer`."""
    load_plugins()
    return ATTENTION_BACKENDS["flashinfer"].__module__
