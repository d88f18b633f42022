"""Putting together the tensors in which safetensors keep one packed matrix. No SGLang here.

Letters: N output rows, K input columns, G groups of K. Leading dimensions are experts.
"""

from collections import defaultdict

import torch
from torch import Tensor

from sglang_step35.checkpoint.quantization import WHOLE_ROW, Quantization
from sglang_step35.packed import words
from sglang_step35.packed.blocks import BlockTensor
from sglang_step35.packed.grouped import CODES, GroupedTensor
from sglang_step35.packed.tensor import PackedTensor

ORDER = ("g_idx", "weight_g_idx")  # which group each column belongs to
LEAVES = (
    *("qweight", "qzeros", "scales"),  # GPTQ, AWQ and both packings of AutoRound
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),  # compressed-tensors
    "weight_scale_inv",  # FP8, beside `weight`
    *("_blocks", "_scales"),  # MXFP4 as the Open Compute Project's files name it
    *ORDER,
)
_QUANTISED = (torch.float8_e4m3fn, torch.int8)  # dtypes of a `weight` that needs a scale


class BadPart(ValueError):
    """A tensor that does not fit the other parts of its matrix. leaf: its last name."""

    def __init__(self, leaf: str, why: str):
        super().__init__(why)
        self.leaf = leaf


def is_part(leaf: str, tensor: Tensor) -> bool:
    """Whether the tensor is no weight by itself."""
    return leaf in LEAVES or (leaf == "weight" and tensor.dtype in _QUANTISED)


class PartCollector:
    """Collects the parts of packed matrices by module name.

    declared: the checkpoint's `quantization_config`; None where only symmetric and GPTQ's first format are expected.
    """

    def __init__(self, declared: Quantization | None):
        self.declared = declared
        self._parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._seen: set[tuple[str, str]] = set()

    def add(self, module: str, leaf: str, tensor: Tensor) -> PackedTensor | None:
        """The matrix with its last part, None before. Raises BadPart."""
        if (module, leaf) in self._seen:
            raise BadPart(leaf, "occurs twice: remove the file that does not belong to the checkpoint")
        self._seen.add((module, leaf))
        if leaf in ORDER:
            _check_order(leaf, tensor)
            return None
        parts = self._parts[module]
        parts[leaf] = tensor
        if self._lacking(parts):
            return None
        return self._assemble(self._parts.pop(module))

    def incomplete(self) -> list[tuple[str, str, str]]:
        """(module, a part that came, a part that did not) of every matrix that cannot be put together."""
        found = []
        for module, parts in self._parts.items():
            lacking = self._lacking(parts)
            # Symmetric weights need no zero points, yet some files carry them.
            if lacking and set(parts) != {"weight_zero_point"}:
                found.append((module, next(iter(parts)), lacking[0]))
        return found

    def _lacking(self, parts: dict[str, Tensor]) -> list[str]:
        zeros = ["weight_zero_point"] if self.declared and self.declared.asymmetric else []
        if "weight_packed" in parts:
            integers = parts["weight_packed"].dtype is torch.int32
            needed = ["weight_packed", "weight_scale", *(["weight_shape", *zeros] if integers else [])]
        elif "weight" in parts:
            integers = parts["weight"].dtype is torch.int8
            needed = ["weight", *(["weight_scale", *zeros] if integers else ["weight_scale_inv"])]
        elif "_blocks" in parts or "_scales" in parts:
            needed = ["_blocks", "_scales"]
        elif {"qweight", "qzeros", "scales"} & set(parts):
            needed = ["qweight", "qzeros", "scales"]
        else:
            needed = ["weight_packed or weight"]
        return [leaf for leaf in needed if leaf not in parts]

    def _assemble(self, parts: dict[str, Tensor]) -> PackedTensor:
        if "qweight" in parts:
            return self._from_words(parts["qweight"], parts["qzeros"], parts["scales"])
        if "_blocks" in parts:
            return self._mxfp4(parts["_blocks"].flatten(-2), parts["_scales"], "_blocks", "_scales")
        packed = parts.get("weight_packed")
        if packed is not None and packed.dtype is torch.uint8:
            return self._mxfp4(packed, parts["weight_scale"], "weight_packed", "weight_scale")
        if packed is not None:
            return self._compressed(packed, parts["weight_scale"], parts["weight_shape"], self._zeros(parts))
        if parts["weight"].dtype is torch.int8:
            return self._int8(parts["weight"], parts["weight_scale"], self._zeros(parts))
        return self._fp8(parts["weight"], parts["weight_scale_inv"])

    def _zeros(self, parts: dict[str, Tensor]) -> Tensor | None:
        """Symmetric weights have none, whatever a file carries along: their library drops them too."""
        return parts["weight_zero_point"] if self.declared and self.declared.asymmetric else None

    def _from_words(self, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> PackedTensor:
        """GPTQ's words run down the columns, AWQ's along the rows."""
        *leading, groups, rows = scales.shape
        if qweight.shape[-1] == rows:
            bits = words.WORD_BITS * qzeros.shape[-1] // rows
            if bits not in (4, 8):
                shape = tuple(qzeros.shape)
                raise BadPart("qzeros", f"has shape {shape}, which holds no zero points of 4 or 8 bits for {rows} rows")
            columns = qweight.shape[-2] * words.WORD_BITS // bits
            _check("qweight", qweight, (*leading, columns * bits // words.WORD_BITS, rows))
        else:
            bits, columns = 4, qweight.shape[-2]
            _check("qweight", qweight, (*leading, columns, rows // 8))
        _check("qzeros", qzeros, (*leading, groups, rows * bits // words.WORD_BITS))
        self._check_groups("scales", bits, columns, groups)
        if qweight.shape[-1] != rows:
            return words.from_awq(qweight, qzeros, scales)
        return words.from_gptq(qweight, qzeros, scales, self.declared.zero_shift if self.declared else 1)

    def _compressed(self, packed: Tensor, scales: Tensor, shape: Tensor, zeros: Tensor | None) -> PackedTensor:
        rows, columns = (int(size) for size in shape.flatten()[-2:])
        bits = words.WORD_BITS * packed.shape[-1] // max(columns, 1)
        if bits not in (4, 8):
            shape_of = f"has shape {tuple(packed.shape)}, which holds no {rows} x {columns} values of 4 or 8 bits"
            raise BadPart("weight_packed", shape_of)
        leading = packed.shape[:-2]
        _check("weight_packed", packed, (*leading, rows, columns * bits // words.WORD_BITS))
        groups = scales.shape[-1]
        _check("weight_scale", scales, (*leading, rows, groups))
        self._check_groups("weight_scale", bits, columns, groups)
        if zeros is not None:
            _check("weight_zero_point", zeros, (*leading, -(-rows * bits // words.WORD_BITS), groups))
        return words.from_compressed(packed, scales, zeros, bits)

    def _int8(self, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> PackedTensor:
        groups = scales.shape[-1]
        _check("weight_scale", scales, (*weight.shape[:-1], groups))
        self._check_groups("weight_scale", 8, weight.shape[-1], groups)
        if zeros is not None:
            _check("weight_zero_point", zeros, tuple(scales.shape))
        return GroupedTensor(CODES["INT8"], weight.view(torch.uint8), scales, zeros)

    def _mxfp4(self, codes: Tensor, scales: Tensor, *leaves: str) -> PackedTensor:
        """codes [.., N, K / 2], scales [.., N, K / 32], both uint8."""
        for leaf, tensor in zip(leaves, (codes, scales), strict=True):
            if tensor.dtype is not torch.uint8:
                raise BadPart(leaf, f"is {tensor.dtype}, MXFP4 needs torch.uint8")
        groups = scales.shape[-1]
        _check(leaves[1], scales, (*codes.shape[:-1], groups))
        self._check_groups(leaves[1], 4, codes.shape[-1] * 2, groups)
        return GroupedTensor(CODES["E2M1"], codes, scales)

    def _fp8(self, weight: Tensor, scales: Tensor) -> PackedTensor:
        block = self.declared.block if self.declared else None
        if block is None:
            raise BadPart("weight_scale_inv", "belongs to FP8, which config.json's quantization_config is not")
        wanted = (-(-size // length) for size, length in zip(weight.shape[-2:], block, strict=True))
        _check("weight_scale_inv", scales, (*weight.shape[:-2], *wanted))
        return BlockTensor(weight, scales, block)

    def _check_groups(self, leaf: str, bits: int, columns: int, groups: int) -> None:
        """Raise BadPart unless all groups are of one width, one that the config asks for."""
        if not groups or columns % groups:
            raise BadPart(leaf, f"has {groups} groups for {columns} columns; the group size must divide the columns")
        found = bits, WHOLE_ROW if groups == 1 else columns // groups
        schemes = self.declared.schemes if self.declared else {found}
        if found not in schemes and (bits, columns // groups) not in schemes:
            asked = " or ".join(f"{size} columns of {width} bits" for width, size in sorted(schemes)) or "none"
            raise BadPart(
                leaf,
                f"means groups of {columns // groups} columns of {bits} bits, quantization_config in config.json asks "
                f"for {asked}: use the config.json that was published with these weights",
            )


def _check(leaf: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(wanted):
        raise BadPart(leaf, f"has shape {tuple(tensor.shape)}, the other parts of its matrix ask for {tuple(wanted)}")


def _check_order(leaf: str, order: Tensor) -> None:
    """Refuse act-order; the order of a checkpoint without it, which GPTQ tools save too, says nothing."""
    width = max(1, int((order == order.flatten()[0]).sum()) // max(1, order.numel() // order.shape[-1]))
    in_order = torch.arange(order.shape[-1], dtype=order.dtype) // width
    if not torch.equal(order, in_order.expand_as(order)):
        raise BadPart(
            leaf, "orders the columns by activation (act-order), which is not implemented here: use desc_act false"
        )
