"""Quantised safetensors of test checkpoints, each written and read back by somebody else's code.

compressed-tensors' own library packs and unpacks its formats, transformers unpacks MXFP4's blocks, FP8 is plain torch,
GPTQ, AWQ and AutoRound are plain numpy (`int4.py`, from the formats' definitions).
Letters: E experts, N output rows, K input columns, G groups of K.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.support import int4

Packed = tuple[dict[str, Tensor], Tensor]  # tensors by last name, and the matrix they stand for


@dataclass(frozen=True)
class Scheme:
    """config: `quantization_config`. pack: a matrix [N, K] -> `Packed`. stacked: whether experts stay [E, N, K].

    joint: what stands between a module's name and the last one.
    """

    config: dict
    pack: Callable[[Tensor], Packed]
    stacked: bool = False
    joint: str = "."


def write(directory: Path, scheme: Scheme, modules: str = int4.QUANTISED.pattern) -> dict[str, Tensor]:
    """Quantise the modules whose names match in place; returns what all weights then stand for, in float32."""
    weights = load_file(directory / "model.safetensors")
    stored, meaning = {}, {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        meaning[name] = weight.float()
        if not name.endswith(".weight") or not re.fullmatch(modules, module):
            stored[name] = weight
        elif weight.dim() == 2:
            tensors, meaning[name] = scheme.pack(weight)
            stored |= {f"{module}{scheme.joint}{leaf}": tensor for leaf, tensor in tensors.items()}
        else:
            experts = [scheme.pack(matrix) for matrix in weight]
            meaning[name] = torch.stack([matrix for _, matrix in experts])
            stored |= _experts(module, [tensors for tensors, _ in experts], scheme)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.config}))
    return meaning


def _experts(module: str, experts: list[dict[str, Tensor]], scheme: Scheme) -> dict[str, Tensor]:
    if scheme.stacked:
        return {f"{module}{scheme.joint}{leaf}": torch.stack([e[leaf] for e in experts]) for leaf in experts[0]}
    layer, part = module.split(".moe.")
    return {
        f"{layer}.moe.experts.{e}.{part}{scheme.joint}{leaf}": tensor
        for e, tensors in enumerate(experts)
        for leaf, tensor in tensors.items()
    }


def fp8(block: tuple[int, int], stacked: bool = True) -> Scheme:
    """E4M3 with a float32 scale a block; the last blocks may be smaller."""

    def pack(matrix: Tensor) -> Packed:
        (rows, columns), (high, wide) = matrix.shape, block
        scales = torch.stack(
            [
                torch.stack([part.abs().max() / 448 for part in strip.split(wide, 1)])
                for strip in matrix.float().split(high, 0)
            ]
        )
        full = scales.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        values = (matrix.float() / full).to(torch.float8_e4m3fn)
        return dict(weight=values, weight_scale_inv=scales), values.float() * full

    config = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=list(block))
    return Scheme(config | dict(modules_to_not_convert=["lm_head"]), pack, stacked)


def mxfp4(blocks: bool) -> Scheme:
    """Experts stacked, in `_blocks` and `_scales` (Open Compute Project), or each by itself (compressed-tensors)."""
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True)
    library = QuantizationScheme(targets=["Linear"], weights=args)

    def pack(matrix: Tensor) -> Packed:
        largest = matrix.float().unflatten(-1, (-1, 32)).abs().amax(-1)
        scales = torch.exp2(torch.log2(largest.clamp(min=1e-8) / 6).ceil())
        state = MXFP4PackedCompressor.compress(dict(weight=matrix.float(), weight_scale=scales), library)
        if not blocks:
            return state, MXFP4PackedCompressor.decompress(dict(state), library)["weight"].float()
        blocked = state["weight_packed"].unflatten(-1, (-1, 16))
        meaning = convert_moe_packed_tensors(blocked[None], state["weight_scale"][None], dtype=torch.float32)
        return dict(blocks=blocked, scales=state["weight_scale"]), meaning[0].T

    if blocks:
        return Scheme(dict(quant_method="mxfp4"), pack, stacked=True, joint="_")
    return Scheme(_compressed_config("mxfp4-pack-quantized", args), pack)


def compressed(
    bits: int, group: int | None, symmetric: bool = True, form: str = "pack-quantized", activations: bool = False
) -> Scheme:
    """group: None for a scale a row."""
    strategy = dict(strategy="channel") if group is None else dict(strategy="group", group_size=group)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    library = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = PackedQuantizationCompressor if form == "pack-quantized" else NaiveQuantizationCompressor

    def pack(matrix: Tensor) -> Packed:
        grouped = matrix.float().unflatten(-1, (-1, group or matrix.shape[1]))
        low, high, half = grouped.amin(-1), grouped.amax(-1), 1 << (bits - 1)
        scales = torch.maximum(-low, high) / (half - 1) if symmetric else (high - low) / (2 * half - 1)
        scales = scales.clamp(min=1e-4).bfloat16()
        zeros = torch.zeros_like(low) if symmetric else (-half - low / scales.float()).round().clamp(-half, half - 1)
        state = dict(weight=matrix.float(), weight_scale=scales.float(), weight_zero_point=zeros.to(torch.int8))
        packed = compressor.compress(state, library)
        meaning = compressor.decompress(dict(packed), library)["weight"]
        return {**packed, "weight_scale": scales}, meaning.float()

    return Scheme(_compressed_config(form, args, activations), pack)


def _compressed_config(form: str, args: QuantizationArgs, activations: bool = False) -> dict:
    inputs = dict(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True) if activations else None
    group = dict(targets=["Linear"], weights=args.model_dump(mode="json"), input_activations=inputs)
    return dict(
        quant_method="compressed-tensors",
        format=form,
        ignore=["lm_head", "re:.*moe.gate$", "re:.*eh_proj$"],
        config_groups={"group_0": group},
    )


def words(form: int4.Format, group: int) -> Scheme:
    """GPTQ, AWQ and AutoRound."""
    return Scheme(form.config, lambda matrix: int4.pack_matrix(matrix, form, group))


def schemes(group: int) -> dict[str, Scheme]:
    """Every format with groups of columns."""
    forms = int4.formats(group)
    gptq = dict(quant_method="gptq", bits=4, group_size=group, sym=False, desc_act=False)
    forms["GPTQ, asymmetric"] = int4.Format("gptq", "gptq", False, gptq)
    forms["GPTQ's second format"] = int4.Format(
        "gptq", "gptq", False, gptq | dict(checkpoint_format="gptq_v2"), zero_shift=0
    )
    forms["GPTQ, 8 bits"] = int4.Format("gptq", "gptq", False, gptq | dict(bits=8), bits=8)
    del forms["AWQ without Marlin"], forms["compressed-tensors"]  # for CUDA, and written by its own library here
    return {name: words(form, group) for name, form in forms.items()} | {
        "compressed-tensors": compressed(4, group),
        "compressed-tensors, asymmetric": compressed(4, group, symmetric=False),
        "compressed-tensors, 8 bits": compressed(8, group),
    }


def other_schemes() -> dict[str, Scheme]:
    """Every format with scales of its own kind."""
    return {
        "FP8": fp8((48, 40)),
        "FP8, experts one by one": fp8((32, 32), stacked=False),
        "W8A8": compressed(8, None, form="int-quantized", activations=True),
        "W8A16": compressed(8, None),
        "W8A16, asymmetric": compressed(8, None, symmetric=False, form="int-quantized"),
        "MXFP4 of compressed-tensors": mxfp4(blocks=False),
        "MXFP4 blocks": mxfp4(blocks=True),
    }
