"""4-bit checkpoints as the quantisers publish them: their packing written out, and read back from the expert kernels.

Letters: N output rows, K input columns, G groups of K, E experts. A quantised matrix is (codes - zeros) * scales with
codes [N, K] in 0 .. 15 (255 with 8 bits), scales and zeros [N, G]. AutoRound and llm-compressor save each routed expert
by itself, as `moe.experts.{e}.gate_proj`, and leave the router, the head gate and the MTP layers alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's interleaving of the eight nibbles of a word
ALSO = re.compile(r"model\.layers\.\d+\.(self_attn\.g_proj|moe\.gate)")  # what some tools pack as well
QUANTISED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj|share_expert\.\w+_proj|moe\.\w+_proj)"
)


@dataclass(frozen=True)
class Format:
    """quantisation: SGLang's name for the resolved method. config: the checkpoint's `quantization_config`."""

    quantisation: str
    packing: str  # "gptq", "awq" or "compressed"
    symmetric: bool
    config: dict
    saves_order: bool = False  # g_idx, which GPTQ tools write even without act-order
    bits: int = 4
    zero_shift: int = 1  # what GPTQ's stored zero points lack


def formats(group: int) -> dict[str, Format]:
    auto_round = dict(quant_method="auto-round", bits=4, group_size=group, sym=True, data_type="int")
    gptq = dict(quant_method="gptq", bits=4, group_size=group, sym=True, desc_act=False)
    awq = dict(quant_method="awq", bits=4, group_size=group, zero_point=True, version="gemm")
    scheme = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group, dynamic=False)
    compressed = dict(
        quant_method="compressed-tensors",
        format="pack-quantized",
        ignore=["lm_head", "re:.*moe.gate$"],
        config_groups={"group_0": dict(targets=["Linear"], weights=scheme, input_activations=None)},
    )
    return {
        "AutoRound": Format("auto-round", "gptq", True, auto_round | dict(packing_format="auto_round:auto_gptq")),
        "AutoRound in AWQ's packing": Format(
            "auto-round", "awq", False, auto_round | dict(packing_format="auto_round:auto_awq", sym=False)
        ),
        "GPTQ": Format("gptq_marlin", "gptq", True, gptq, saves_order=True),
        "AWQ": Format("awq_marlin", "awq", False, awq),
        "AWQ without Marlin": Format("awq", "awq", False, awq),
        "compressed-tensors": Format("compressed-tensors", "compressed", True, compressed),
    }


def published_configs(group: int, layers: int) -> dict[str, Format]:
    """The formats with all that their tools write into `quantization_config`, for a backbone of `layers` layers.

    The router and the head gate stay in 16 bits, which each tool says in its own way; so do the MTP layers.
    """
    whole = dict(formats(group))
    kept = [f"model.layers.{i}.{part}" for i in range(layers) for part in ("self_attn.g_proj", "moe.gate")]
    auto_round = dict(
        iters=200, low_gpu_mem_usage=True, autoround_version="0.9.6", block_name_to_quantize="model.layers",
        extra_config={name: dict(bits=16, data_type="float") for name in kept},
    )  # fmt: skip
    more = {
        "AutoRound": auto_round,
        "AutoRound in AWQ's packing": auto_round,
        "GPTQ": dict(
            lm_head=False, checkpoint_format="gptq", pack_dtype="int32",
            dynamic={"-:.*self_attn.g_proj": {}, "-:.*moe.gate$": {}},
            meta=dict(quantizer=["gptqmodel:5.6.0"], damp_percent=0.05, mse=0.0, static_groups=False),
        ),
        "AWQ": dict(modules_to_not_convert=["g_proj", "moe.gate.", "lm_head"]),
    }  # fmt: skip
    more["AWQ without Marlin"] = more["AWQ"]
    scheme = whole["compressed-tensors"].config["config_groups"]["group_0"]["weights"]
    scheme = scheme | dict(actorder=None, block_structure=None, observer="minmax", observer_kwargs={})
    more["compressed-tensors"] = dict(
        config_groups={
            "group_0": dict(targets=["Linear"], weights=scheme, input_activations=None, output_activations=None)
        },
        ignore=["lm_head", "re:.*moe.gate$", "re:.*self_attn.g_proj$"],
        kv_cache_scheme=None,
        quantization_status="compressed",
        version="0.13.0",
    )
    return {name: replace(form, config=form.config | more[name]) for name, form in whole.items()}


def described(rows: int, columns: int, form: Format, group: int) -> dict[str, Tensor]:
    """The tensors of a packed matrix without their values, on the meta device."""
    groups, word = columns // group, 32 // form.bits
    empty = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device="meta")
    scales = dict(dtype=torch.bfloat16)
    if form.packing == "compressed":
        return dict(
            weight_packed=empty(rows, columns // word),
            weight_scale=empty(rows, groups, **scales),
            weight_shape=empty(2, dtype=torch.int64),
        )
    tensors = dict(scales=empty(groups, rows, **scales), qzeros=empty(groups, rows // word))
    if form.packing == "awq":
        return tensors | dict(qweight=empty(columns, rows // word))
    tensors["qweight"] = empty(columns // word, rows)
    return tensors | (dict(g_idx=empty(columns)) if form.saves_order else {})


def quantise(
    weights: dict[str, Tensor], form: Format, group: int, layers: int, also: bool = False
) -> tuple[dict, dict]:
    """The checkpoint in this format, and what each quantised matrix then stands for [N, K], by module name."""
    packed, meaning = {}, {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        packs = QUANTISED.fullmatch(module) or (also and ALSO.fullmatch(module))
        if not packs or int(name.split(".")[2]) >= layers:
            packed[name] = weight
            continue
        parts = {module: weight}
        if weight.dim() == 3:
            layer, part = module.split(".moe.")
            parts = {f"{layer}.moe.experts.{e}.{part}": expert for e, expert in enumerate(weight)}
        for single, matrix in parts.items():
            tensors, meaning[single] = pack_matrix(matrix, form, group)
            packed |= {f"{single}.{leaf}": tensor for leaf, tensor in tensors.items()}
    return packed, meaning


def experts_meaning(layer) -> dict[str, Tensor]:
    """What the Triton kernel reads in a layer of experts: w13 [E, 2 N, K] and w2 [E, K, N], float32."""
    info = (layer.scheme or layer.quant_method).get_triton_quant_info(layer)
    zeros = info.w13_zp, info.w2_zp
    halves = zip(("w13", "w2"), (info.w13_weight, info.w2_weight), (info.w13_scale, info.w2_scale), zeros, strict=True)
    return {name: _read(weight, scale, zero) for name, weight, scale, zero in halves}


def pack_matrix(matrix: Tensor, form: Format, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one matrix [N, K] by their last names, and what they stand for."""
    rows, columns = matrix.shape
    grouped = matrix.float().view(rows, columns // group, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    top = (1 << form.bits) - 1
    half = (top + 1) // 2
    scales = (torch.maximum(-low, high) / (half - 1) if form.symmetric else (high - low) / top).clamp(min=1e-4)
    scales = scales.bfloat16()
    zeros = torch.full_like(low, half) if form.symmetric else (-low / scales.float()).round().clamp(1, top)
    codes = ((grouped / scales[..., None].float()).round() + zeros[..., None]).clamp(0, top)
    meaning = ((codes - zeros[..., None]) * scales[..., None].float()).view(rows, columns)
    codes, zeros = codes.view(rows, columns).long(), zeros.long()
    if form.packing == "compressed":
        shape = torch.tensor([rows, columns])
        return dict(weight_packed=_pack(codes), weight_scale=scales, weight_shape=shape), meaning
    tensors = dict(scales=scales.T.contiguous())
    if form.packing == "awq":
        return tensors | dict(qweight=_pack(codes.T, AWQ_ORDER), qzeros=_pack(zeros.T, AWQ_ORDER)), meaning
    # GPTQ stores zeros less one, and its words run down the columns.
    stored_zeros = _pack(zeros.T - form.zero_shift, bits=form.bits)
    tensors |= dict(qweight=_pack(codes, bits=form.bits).T.contiguous(), qzeros=stored_zeros)
    if form.saves_order:
        tensors["g_idx"] = torch.arange(columns, dtype=torch.int32) // group
    return tensors, meaning


def _pack(codes: Tensor, order: Sequence[int] | None = None, bits: int = 4) -> Tensor:
    """[R, P C] -> [R, C] int32: code i of a word is element order[i] of its P."""
    order = order or range(32 // bits)
    parts = codes.contiguous().reshape(len(codes), -1, 32 // bits).numpy().astype(np.uint32)
    words = sum(parts[..., element] << np.uint32(bits * i) for i, element in enumerate(order))
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def _read(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """weight [E, N, K / 2] uint8, low nibble first; scale [E, N, G]; zero [E, N / 2, G] uint8 or None for 8."""
    nibbles = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2).float()
    repeats = nibbles.shape[-1] // scale.shape[-1]
    zeros = torch.full_like(scale.float(), 8)
    if zero is not None:
        zeros = torch.stack((zero & 15, zero >> 4), dim=2).flatten(1, 2).float()
    return (nibbles - zeros.repeat_interleave(repeats, -1)) * scale.float().repeat_interleave(repeats, -1)
