"""Packed 4- and 8-bit matrices of layers that we keep unquantised, unpacked while they load.

Quantisers pack every matrix whose sides they can divide: the head gate too, whose 64 or 96 rows SGLang's kernels do not
take, and sometimes the router. Such matrices are small.
Letters: N output rows, K input columns, G groups of K, P values of a 32-bit word.
"""

from collections import defaultdict

import torch
from torch import Tensor

_WORDS = ("qweight", "qzeros", "scales")  # GPTQ, AWQ and both packings of AutoRound
_COMPRESSED = ("weight_packed", "weight_scale", "weight_shape")  # compressed-tensors, symmetric
PACKED_LEAVES = (*_WORDS, *_COMPRESSED, "g_idx")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of its eight values a word's i-th four bits hold


class Unpacker:
    """Collects the parts of packed matrices by module name."""

    def __init__(self):
        self._parts: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def add(self, module: str, leaf: str, tensor: Tensor) -> Tensor | None:
        """The matrix [N, K] float32 with its last part, None before."""
        parts = self._parts[module]
        parts[leaf] = tensor
        for leaves, unpack in ((_WORDS, _from_words), (_COMPRESSED, _from_compressed)):
            if leaf in leaves and all(part in parts for part in leaves):
                return unpack(*(parts[part] for part in leaves))
        return None


def _from_words(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """scales [G, N], qzeros [G, N / P].

    GPTQ's words run along K, qweight [K / P, N], and its zeros are stored less one; AWQ's run along N, [K, N / 8].
    """
    if qweight.shape[1] == scales.shape[1]:
        bits = 32 * qzeros.shape[1] // scales.shape[1]
        values, zeros = _values(qweight.T, bits), _values(qzeros, bits) + 1
    else:
        values, zeros = _values(qweight, 4, _AWQ_ORDER).T, _values(qzeros, 4, _AWQ_ORDER)
    return _scaled(values, zeros.T, scales.T)


def _from_compressed(packed: Tensor, scales: Tensor, shape: Tensor) -> Tensor:
    """packed [N, K / P], scales [N, G], shape (N, K); values are stored plus half their range."""
    bits = 32 * packed.shape[1] // int(shape[1])
    return _scaled(_values(packed, bits), torch.full_like(scales, 1 << (bits - 1)), scales)


def _values(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """words [R, C] int32 -> [R, C P] of 0 .. 2^bits - 1, lowest bits first; order: see `_AWQ_ORDER`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words[..., None] >> shifts) & ((1 << bits) - 1)
    if order is not None:
        values = values[..., torch.tensor(order).argsort()]
    return values.flatten(-2)


def _scaled(values: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """values [N, K], zeros and scales [N, G] -> [N, K] float32."""
    group = values.shape[1] // scales.shape[1]
    zeros, scales = (x.float().repeat_interleave(group, 1) for x in (zeros, scales))
    return (values - zeros) * scales
