"""Weights in 2 bits, a step for every 32 columns of a row: a format of our own, to tell large products from small ones.

A weight becomes the nearest of -1.5, -0.5, 0.5 and 1.5 steps. The step is the standard deviation's share that suits
normal weights best (Max 1960): a product of many is then off by a third of what such products vary by.

Rows are interleaved by eights, 80 bytes for 32 columns: the halves of 8 steps (float16), then for each half of the
columns 4 bytes of every row, of which byte b has columns b, 4 + b, 8 + b and 12 + b from its lowest bits on.
"""

import torch
from torch import Tensor

TWO_BITS = 25  # GGML's number of int16, which stands for it: the library knows no such weights
ROWS, COLUMNS, BLOCK = 8, 32, 80
_STEP = 0.9957  # standard deviations


def encode(weights: Tensor) -> Tensor:
    """[R, K] of any floating-point type, R in eights and K in 32s -> bytes [R, K / 32 * 10]."""
    rows, columns = weights.shape
    blocks = weights.float().view(rows // ROWS, ROWS, columns // COLUMNS, COLUMNS).transpose(1, 2)  # [R/8, K/32, 8, 32]
    steps = (blocks.square().mean(-1, keepdim=True).sqrt_() * _STEP).clamp_(min=torch.finfo(torch.float16).tiny)
    codes = (blocks / steps).add_(2).clamp_(0, 3).to(torch.uint8)  # cuts off what is behind the point
    quarters = codes.unflatten(-1, (2, 4, 4))  # halves, quarters of these, bytes
    shifts = torch.tensor([1, 4, 16, 64], dtype=torch.uint8)[:, None]
    packed = (quarters * shifts).sum(-2, dtype=torch.uint8).transpose(-3, -2).flatten(-3)  # [R/8, K/32, 64]
    halves = (steps / 2).half().squeeze(-1).contiguous().view(torch.uint8)
    return torch.cat((halves, packed), dim=-1).view(rows, -1)
