"""Matrices whose values stand in 32-bit words: GPTQ, AWQ, both packings of AutoRound, compressed-tensors.

Codes become rows of bytes, low half first. compressed-tensors' words already are that in memory (little-endian), so its
codes stay in the mapped file; GPTQ's words run down the columns and are transposed, AWQ's are put in order.
Letters: N output rows, K input columns, G groups of K, P values of a word. Leading dimensions are experts.
"""

import torch
from torch import Tensor

from sglang_step35.packed.grouped import CODES, GroupedTensor, nibbles

WORD_BITS = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of its eight values a word's i-th four bits hold


def from_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, shift: int = 1) -> GroupedTensor:
    """qweight [.., K / P, N], qzeros [.., G, N / P], scales [.., G, N].

    shift: what the stored zero points lack; GPTQ's first format stores them less one, its second as they are.
    """
    bits = WORD_BITS * qzeros.shape[-1] // scales.shape[-1]
    zeros = word_values(qzeros, bits).short() + shift
    return _grouped(qweight.mT.contiguous().view(torch.uint8), bits, scales.mT.contiguous(), zeros.mT)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> GroupedTensor:
    """qweight [.., K, N / 8], qzeros [.., G, N / 8], scales [.., G, N]; 4 bits."""
    zeros = word_values(qzeros, 4).unflatten(-1, (-1, 8))[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(-2)
    return _grouped(_awq_codes(qweight), 4, scales.mT.contiguous(), zeros.mT)


def from_compressed(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> GroupedTensor:
    """packed [.., N, K / P], scales [.., N, G], zeros [.., N / P, G] or None; all stored plus half their range."""
    if zeros is not None:
        zeros = word_values(zeros.mT.contiguous(), bits).mT[..., : scales.shape[-2], :]
    return _grouped(packed.contiguous().view(torch.uint8), bits, scales, zeros)


def word_values(words: Tensor, bits: int) -> Tensor:
    """words [.., C] int32 -> [.., C P] uint8 of 0 .. 2^bits - 1, lowest bits first."""
    data = words.contiguous().view(torch.uint8)
    return nibbles(data) if bits == 4 else data


def _awq_codes(qweight: Tensor) -> Tensor:
    """[.., K, N / 8] int32 -> [.., N, K / 2] uint8, byte by byte: unpacking every value would take minutes a layer."""
    data = qweight.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))  # [.., K, N / 8, 4]
    even, odd = data[..., 0::2, :, :], data[..., 1::2, :, :]
    halves = (even & 15) | (odd << 4), (even >> 4) | (odd & 240)  # of each byte the lower and the upper value
    *leading, pairs, words, _ = even.shape
    codes = torch.empty(*leading, words, 8, pairs, dtype=torch.uint8)
    for place, row in enumerate(_AWQ_ORDER):
        codes[..., row, :] = halves[place % 2][..., place // 2].mT
    return codes.flatten(-3, -2)


def _grouped(codes: Tensor, bits: int, scales: Tensor, zeros: Tensor | None) -> GroupedTensor:
    """codes [.., N, bytes] uint8, scales and zeros [.., N, G]; zero points in the middle of the range are dropped."""
    if zeros is None or bool((zeros == 1 << (bits - 1)).all()):
        return GroupedTensor(CODES["INT4" if bits == 4 else "INT8 + 128"], codes, scales)
    zeros = zeros.to(torch.uint8 if bits == 4 else torch.int16).contiguous()
    return GroupedTensor(CODES[f"UINT{bits}"], codes, scales, zeros)
