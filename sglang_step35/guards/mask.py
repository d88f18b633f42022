"""Rows of SGLang's token masks: 32 tokens in an int32 word, a set bit allows. Letters: V vocabulary, W words."""

import numpy as np
import torch
from torch import Tensor


def words(vocab_size: int) -> int:
    """W of a vocabulary."""
    return (vocab_size + 31) // 32


def only(token: int, width: int) -> Tensor:
    """[W]: this token alone."""
    row = torch.zeros(width, dtype=torch.int32)
    row[token // 32] = _bit(token)
    return row


def all_but(tokens: set[int], width: int) -> Tensor:
    """[W]: every other token."""
    row = torch.full((width,), -1, dtype=torch.int32)
    for token in tokens:
        row[token // 32] &= ~_bit(token)
    return row


def allowing(forbidden: np.ndarray) -> Tensor:
    """[W] from [V] bool."""
    allowed = np.ones(words(len(forbidden)) * 32, dtype=bool)
    allowed[: len(forbidden)] = ~forbidden
    return torch.from_numpy(np.packbits(allowed, bitorder="little").view(np.int32).copy())


def narrow(row: Tensor, rule: Tensor) -> bool:
    """Leave in `row` what `rule` allows too; a row that would be left empty stays as it is, and False is returned."""
    narrowed = row & rule
    if not narrowed.any():
        return False
    row.copy_(narrowed)
    return True


def _bit(token: int) -> int:
    """The token's bit as an int32."""
    bit = 1 << token % 32
    return bit - (1 << 32) if bit >> 31 else bit
