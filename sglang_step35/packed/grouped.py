"""Integer or FP4 codes with a scale, and sometimes a zero point, for each group of columns: INT4, INT8, MXFP4.

Bytes a weight takes: half a one or one for its code, and its share of the scale (2 bytes in bfloat16, 1 in MXFP4) and
of the zero point (1 byte, 2 for 8-bit codes): 0.5625 with symmetric INT4 in groups of 32, 0.516 in groups of 128.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglang_step35.packed.tensor import PackedTensor, check_cut

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# A scale of MXFP4 is an exponent; 255 stands for NaN (OCP Microscaling Formats 1.0, section 5.4.1).
_E8M0 = torch.tensor([math.ldexp(1.0, exponent - 127) for exponent in range(255)] + [math.nan])


def nibbles(data: Tensor) -> Tensor:
    """[..., b] uint8 -> [..., 2 b] uint8, the low half of each byte first."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


@dataclass(frozen=True)
class Code:
    """How a byte stores weights. values: [..., b] -> [..., b * 8 / bits] float32, without scale and zero point."""

    name: str
    bits: int
    values: Callable[[Tensor], Tensor]


CODES = {
    code.name: code
    for code in (
        Code("UINT4", 4, lambda data: nibbles(data).float()),
        Code("INT4", 4, lambda data: nibbles(data).float() - 8),
        Code("UINT8", 8, lambda data: data.float()),
        Code("INT8", 8, lambda data: data.view(torch.int8).float()),
        Code("INT8 + 128", 8, lambda data: data.float() - 128),
        Code("E2M1", 4, lambda data: _E2M1[nibbles(data).int()]),
    )
}


@dataclass(frozen=True, eq=False)
class GroupedTensor(PackedTensor):
    """(code - zero) * scale. Letters: R rows, B bytes of a row, G groups of a row, all of one width.

    codes: [..., R, B] uint8. scales: [..., R, G] floats, or uint8 exponents (E8M0). zeros: [..., R, G] integers.
    """

    code: Code
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.code.bits)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[-1] // self.scales.shape[-1]

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return (self.codes, self.scales, *(() if self.zeros is None else (self.zeros,)))

    def __getitem__(self, index) -> "GroupedTensor":
        zeros = None if self.zeros is None else self.zeros[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], zeros=zeros)

    def rows(self, start: int, end: int) -> "GroupedTensor":
        return self[..., start:end, :]

    def columns(self, start: int, end: int) -> "GroupedTensor":
        per_byte = 8 // self.code.bits
        whole = self.scales.shape[-1] == 1  # a scale a row: any cut between bytes will do
        unit, what = (per_byte, "bytes") if whole else (self.group, "quantisation groups")
        check_cut(self.shape[-1], start, end, unit, what)
        codes = self.codes[..., start // per_byte : end // per_byte]
        if whole:
            return replace(self, codes=codes)
        cut = slice(start // self.group, end // self.group)
        zeros = None if self.zeros is None else self.zeros[..., cut]
        return replace(self, codes=codes, scales=self.scales[..., cut], zeros=zeros)

    def dequantize(self) -> Tensor:
        values = self.code.values(self.codes).unflatten(-1, (self.scales.shape[-1], -1))
        if self.zeros is not None:
            values = values - self.zeros.float().unsqueeze(-1)
        scales = _E8M0[self.scales.int()] if self.scales.dtype is torch.uint8 else self.scales.float()
        return (values * scales.unsqueeze(-1)).flatten(-2)

    @property
    def kind(self) -> tuple:
        return (*super().kind, self.code.name)
