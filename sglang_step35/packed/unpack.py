"""How each GGML type stores a block of weights, in plain torch.

Every function takes blocks [N, bytes] uint8 and returns their values [N, weights] float32, computed as ggml's
reference does (ggml-quants.c: dequantize_row_*): float16 scales widened first, products in float32.
"""

import torch
from torch import Tensor

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def q8_0(blocks: Tensor) -> Tensor:
    """2 bytes d, 32 int8 q: d q."""
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def q4_0(blocks: Tensor) -> Tensor:
    """2 bytes d, 16 bytes of two q each, the low halves first: d (q - 8)."""
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16) - 8)


def q4_1(blocks: Tensor) -> Tensor:
    """2 bytes d, 2 m, 16 bytes as q4_0: d q + m."""
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16) + _half(blocks, 2)


def mxfp4(blocks: Tensor) -> Tensor:
    """1 byte e, 16 bytes of two E2M1 numbers each, the low halves first: 2^(e - 127) number."""
    scale = torch.ldexp(torch.ones(()), blocks[:, :1].int() - 127)
    return scale * _E2M1[_nibbles(blocks[:, 1:], 16).int()]


def q4_k(blocks: Tensor) -> Tensor:
    """2 bytes d, 2 dmin, 12 of 6-bit scales and minima, 128 of q: d scale q - dmin min, in 8 groups of 32."""
    return _scaled(blocks, _nibbles(blocks[:, 16:], 32))


def q5_k(blocks: Tensor) -> Tensor:
    """As q4_k with 32 bytes before the q: bit j of byte l is the fifth bit of weight l of group j."""
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    fifth = blocks[:, None, 16:48] >> bits[:, None] & 1  # [N, 8, 32]
    return _scaled(blocks, _nibbles(blocks[:, 48:], 32) + fifth.flatten(1) * 16)


def q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of the lower 4 bits, 64 of the upper 2, 16 int8 scales, 2 bytes d: d scale (q - 32), 16 groups of 16.

    Each half of the block: 64 bytes of low bits (two nibbles), 32 of high bits (four pairs), 128 weights.
    """
    low = _nibbles(blocks[:, :128], 64).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts[:, None] & 3  # [N, 2, 4, 32]
    values = (low + high * 16).float() - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # [N, 16]
    return (values.view(-1, 16, 16) * scales[:, :, None]).flatten(1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at this byte of every block: [N, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(data: Tensor, run: int) -> Tensor:
    """[N, b] -> [N, 2 b] int16: of each `run` bytes first the low halves, then the high ones."""
    runs = data.reshape(len(data), -1, 1, run)
    return torch.cat((runs & 15, runs >> 4), dim=2).flatten(1).short()


def _scaled(blocks: Tensor, values: Tensor) -> Tensor:
    """A K-quant's values [N, 256] with the scale and minimum of their groups of 32 applied."""
    packed = blocks[:, 4:16]
    first, second, third = packed.split(4, dim=1)  # scales 0-3, minima 0-3, the low halves of both 4-7
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=1).float() * _half(blocks, 0)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=1).float() * _half(blocks, 2)
    return (values.view(-1, 8, 32) * scales[:, :, None] - minima[:, :, None]).flatten(1)
