"""A tokenizer from a GGUF file's metadata: byte-level BPE, as llama.cpp reads it.

SGLang's own builder knows other pre-tokenizers and drops added tokens that are no control tokens (`<think>`).
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sglang_step35.checkpoint.base import DamagedFile
from sglang_step35.checkpoint.gguf_file import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4  # `tokenizer.ggml.token_type`

# `tokenizer.ggml.pre` -> the patterns a text is cut with, one after the other; none: GPT-2's, built into ByteLevel.
_CUTS: dict[str, tuple[str, ...]] = {
    "gpt-2": (),
    "default": (),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
_NAMED = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
_OTHERWISE = "give the published one: --tokenizer-path stepfun-ai/Step-3.5-Flash"


def build_tokenizer(file: GGUFFile, **options: Any) -> PreTrainedTokenizerFast:
    """Raises DamagedFile where the file has no tokenizer, or one of another kind."""
    kind, pre = _key(file, "model"), file.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _CUTS:
        raise DamagedFile(
            f"{file.path} has a tokenizer of the kind {kind}, {pre}, which is not implemented: {_OTHERWISE}"
        )
    tokens, types = _key(file, "tokens"), _key(file, "token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _key(file, "merges")]
    # Added tokens stand in the vocabulary too, which keeps their numbers; no merge ends in one.
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = _pre_tokenizer(_CUTS[pre])
    backend.decoder = decoders.ByteLevel()
    for wanted in (_CONTROL, _USER_DEFINED):
        added = (token for token, kind in zip(tokens, types, strict=True) if kind == wanted)
        backend.add_tokens([AddedToken(token, normalized=False, special=wanted == _CONTROL) for token in added])
    named = {f"{name}_token": _named(file, tokens, key) for name, key in _NAMED.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
        **options,
    )


def _key(file: GGUFFile, name: str) -> Any:
    value = file.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise DamagedFile(f"{file.path} has no tokenizer (tokenizer.ggml.{name} is missing): {_OTHERWISE}")
    return value


def _named(file: GGUFFile, tokens: list[str], key: str) -> str | None:
    index = file.get(f"tokenizer.ggml.{key}")
    return None if index is None else tokens[index]


def _pre_tokenizer(cuts: tuple[str, ...]):
    if not cuts:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
