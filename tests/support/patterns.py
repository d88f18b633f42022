"""Regular expressions as grammars of their own, by the `regex` package: what may follow a text, token by token."""

import json
from functools import cache

import regex
import torch
from torch import Tensor
from transformers import AutoTokenizer

from sglang_step35.assets import NANO

CONFIG = json.loads((NANO / "config.json").read_text())
VOCAB, EOS, THINK_END = CONFIG["vocab_size"], CONFIG["eos_token_id"], 6


@cache
def pieces() -> list[str]:
    """Each token of nano's tokenizer as text, "" for the special ones; part of a character is no text of a pattern."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return ["" if token in special else tokenizer.decode([token]) for token in range(VOCAB)]


@cache
def allowed(pattern: str, output: tuple[int, ...]) -> Tensor:
    """[V] bool: the tokens after which `output` can still become a text of the pattern; EOS where it is one."""
    text = "".join(pieces()[token] for token in output)
    found = [bool(piece) and bool(regex.fullmatch(pattern, text + piece, partial=True)) for piece in pieces()]
    whole = bool(regex.fullmatch(pattern, text))
    return torch.tensor([whole if token in EOS else fits for token, fits in enumerate(found)])
