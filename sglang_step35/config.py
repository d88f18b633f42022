"""The frozen, checked view of a Step-3.5 `config.json`, parsed once.

`parse_config` turns the published field layout into a `ModelSpec`. Everything in the plug-in reads the specs and
nothing else: a per-layer question ("how many heads, which window, which theta") has one answer, `spec.layers[i]`. Bad
input ends in a `ConfigError` that names the field, the value and the remedy. No SGLang and no torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_step35.config_fields import FIXED_FIELDS, READ_FIELDS, ConfigError, Fields, FrozenFields
from sglang_step35.config_step37 import text_fields
from sglang_step35.config_unknown import check_unknown

ALL_KEYS = -1  # `earlier_keys` of a layer without a window


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one layer (`rope_theta`, `partial_rotary_factors`, `rope_scaling`, `yarn_only_types`)."""

    theta: float
    partial_factor: float  # share of head_dim that is rotated
    scaling: Mapping[str, Any] | None  # llama3 fields, `rope_type` included; None where it does not apply
    max_position: int  # tokens


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer. `window` counts keys, the query's own among them; None sees every earlier key."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    rope: RopeSpec
    head_gate: bool  # each head's output times sigmoid(g_proj(x)) (`use_head_wise_attn_gate`)

    @property
    def earlier_keys(self) -> int:
        """Keys before the query's own, or ALL_KEYS: what RadixAttention and FlashInfer's `window_left` take."""
        return ALL_KEYS if self.window is None else self.window - 1

    @property
    def rotary_dim(self) -> int:
        """Rotated channels of a head, always even."""
        return int(self.head_dim * self.rope.partial_factor)


@dataclass(frozen=True)
class MoESpec:
    """Routed and shared experts of one layer."""

    num_experts: int
    top_k: int
    expert_size: int  # intermediate width of one routed expert
    shared_size: int  # intermediate width of the shared expert
    scaling_factor: float  # times the routed sum only (`moe_router_scaling_factor`)
    renormalize: bool  # chosen weights sum to 1 before scaling (`norm_expert_weight`)
    router_bias: bool  # added for choosing, never to the weights (`use_moe_router_bias`)
    fp32_router: bool  # `need_fp32_gate`
    limit: float | None  # SwiGLU clamp of the routed experts (`swiglu_limits`)


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: a dense FFN (`dense_size`) or experts (`moe`), never both."""

    index: int  # as in the checkpoint's `model.layers.{index}`; MTP layers follow the backbone's
    attention: AttentionSpec
    moe: MoESpec | None
    dense_size: int | None
    limit_shared: float | None  # SwiGLU clamp of the dense FFN or the shared expert (`swiglu_limits_shared`)


@dataclass(frozen=True)
class ModelSpec:
    """A whole checkpoint: backbone layers and the multi-token-prediction layers behind them."""

    vocab_size: int
    hidden_size: int
    rms_norm_eps: float
    max_position: int  # tokens
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None  # absent from the published config
    tie_word_embeddings: bool
    layers: tuple[LayerSpec, ...]
    mtp_layers: tuple[LayerSpec, ...]

    @property
    def num_layers(self) -> int:
        """Backbone layers, MTP layers not counted."""
        return len(self.layers)

    @property
    def window(self) -> int | None:
        """The sliding window all sliding layers share, or None when there is none."""
        windows = (layer.attention.window for layer in (*self.layers, *self.mtp_layers))
        return next((window for window in windows if window is not None), None)

    @property
    def earlier_keys(self) -> int:
        """`AttentionSpec.earlier_keys` of the sliding layers, ALL_KEYS when there are none."""
        found = (layer.attention.earlier_keys for layer in (*self.layers, *self.mtp_layers))
        return next((earlier for earlier in found if earlier != ALL_KEYS), ALL_KEYS)

    @property
    def sliding_layer_ids(self) -> tuple[int, ...]:
        """Backbone layers with a window."""
        return tuple(layer.index for layer in self.layers if layer.attention.window is not None)

    @property
    def full_layer_ids(self) -> tuple[int, ...]:
        """Backbone layers that see every earlier key."""
        return tuple(layer.index for layer in self.layers if layer.attention.window is None)


FULL, SLIDING = "full_attention", "sliding_attention"

MAX_MTP_LAYERS = 3
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def parse_config(fields: Mapping[str, Any] | Any) -> ModelSpec:
    """Check a config and turn it into a ModelSpec.

    fields: the mapping read from config.json, of Step-3.7 too, or a PretrainedConfig. Unknown keys matter in a mapping
        only, see `check_unknown`: a live config object also carries what SGLang writes onto it (context_len,
        v_head_dim, ...), and `Step35HFConfig` has checked its file when it was loaded.
    Raises ConfigError, naming the field, its value and the remedy.
    """
    if isinstance(fields, Mapping):
        config = Fields(text_fields(fields))
        check_unknown(config)
    else:
        names = READ_FIELDS | FIXED_FIELDS.keys()
        config = Fields({name: getattr(fields, name) for name in names if hasattr(fields, name)})
    config.require_fixed(FIXED_FIELDS)

    backbone, nextn = config.integer("num_hidden_layers"), _nextn_layers(config)
    attention = _attention_specs(config, backbone + nextn)
    moe = _moe_specs(config, backbone, backbone + nextn)
    limits_shared = _limits(config, "swiglu_limits_shared", backbone + nextn)
    dense_size = config.integer("intermediate_size")
    layers = tuple(
        LayerSpec(i, attention[i], moe.get(i), None if i in moe else dense_size, limits_shared[i])
        for i in range(backbone + nextn)
    )
    return ModelSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        rms_norm_eps=config.positive("rms_norm_eps", 1e-5),  # absent from the published file; StepFun's default
        max_position=config.integer("max_position_embeddings"),
        bos_token_id=config.integer("bos_token_id", minimum=0, default=None),
        eos_token_ids=config.token_ids("eos_token_id"),
        pad_token_id=config.integer("pad_token_id", minimum=0, default=None),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        layers=layers[:backbone],
        mtp_layers=layers[backbone:],
    )


def _nextn_layers(config: Fields) -> int:
    """`num_nextn_predict_layers`, 0 to 3."""
    count = config.integer("num_nextn_predict_layers", minimum=0, default=0)
    if count > MAX_MTP_LAYERS:
        raise config.fail("num_nextn_predict_layers", f"expected 0 to {MAX_MTP_LAYERS}; the checkpoints have 3")
    return count


def _attention_specs(config: Fields, count: int) -> list[AttentionSpec]:
    """One AttentionSpec for each of `count` layers, MTP layers included."""
    types = config.per_layer("layer_types", count)
    for i, layer_type in enumerate(types):
        if layer_type not in (FULL, SLIDING):
            raise ConfigError(
                f"config field layer_types has {layer_type!r} at entry {i}: expected {FULL!r} or {SLIDING!r}"
            )
    shapes = {FULL: (*_head_shape(config), None)}
    if SLIDING in types:
        shapes[SLIDING] = (*_head_shape(_other_setting(config)), config.integer("sliding_window"))
    gate = config.flag("use_head_wise_attn_gate")
    ropes = _rope_specs(config, types)
    specs = [AttentionSpec(*shapes[layer_type], rope, gate) for layer_type, rope in zip(types, ropes, strict=True)]
    for i, spec in enumerate(specs):
        if spec.rotary_dim < 2 or spec.rotary_dim % 2:
            raise config.fail(
                "partial_rotary_factors",
                f"entry {i} rotates {spec.rotary_dim} of {spec.head_dim} channels; expected an even number above 0",
            )
    return specs


def _other_setting(config: Fields) -> Fields:
    """`attention_other_setting`: the head shape of the sliding layers."""
    keys = ("attention_type", "num_attention_heads", "num_attention_groups", "head_dim", "true_head_dim")
    other = config.table("attention_other_setting", keys)
    if other is None:
        raise config.fail("attention_other_setting", "layer_types has sliding layers, whose head shape it must give")
    if other.raw("attention_type", SLIDING) != SLIDING:
        raise other.fail("attention_type", f"only {SLIDING!r} layers may have their own head shape")
    if other.integer("true_head_dim", default=other.integer("head_dim")) != other.integer("head_dim"):
        raise other.fail("true_head_dim", "padded heads are not implemented; it must equal head_dim")
    return other


def _head_shape(config: Fields) -> tuple[int, int, int]:
    """(query heads, key/value heads, channels of a head) from the top level or `attention_other_setting`."""
    heads, groups = config.integer("num_attention_heads"), config.integer("num_attention_groups")
    if heads % groups:
        raise config.fail("num_attention_heads", f"not a multiple of num_attention_groups, {groups}")
    return heads, groups, config.integer("head_dim")


def _rope_specs(config: Fields, types: tuple[str, ...]) -> list[RopeSpec]:
    """One RopeSpec for each layer type of `types`."""
    rope_layers = config.raw("use_rope_layers", [])
    if not isinstance(rope_layers, (list, tuple)) or not all(flag is True for flag in rope_layers):
        raise config.fail("use_rope_layers", "layers without RoPE are not implemented; expected [] or only true")
    count, max_position = len(types), config.integer("max_position_embeddings")
    thetas = config.per_layer_numbers("rope_theta", count, lambda v: v > 0, "expected a number above 0", scalar=True)
    factors = config.per_layer_numbers(
        "partial_rotary_factors", count, lambda v: 0 < v <= 1, "expected a share in (0, 1]", default=1.0, scalar=True
    )
    scaling = _llama3_scaling(config)
    # Engines disagree on what an absent list means (nowhere, everywhere), so it must be there.
    scaled_types = config.raw("yarn_only_types") if scaling else []
    if not isinstance(scaled_types, (list, tuple)) or not all(kind in (FULL, SLIDING) for kind in scaled_types):
        raise config.fail("yarn_only_types", f"expected a list with {FULL!r} or {SLIDING!r} in it")
    return [
        RopeSpec(theta, factor, scaling if layer_type in scaled_types else None, max_position)
        for layer_type, theta, factor in zip(types, thetas, factors, strict=True)
    ]


def _llama3_scaling(config: Fields) -> FrozenFields | None:
    """`rope_scaling`, of the llama3 type only; older files write `type` for `rope_type`."""
    scaling = config.table("rope_scaling", ("rope_type", "type", *_LLAMA3_KEYS))
    if scaling is None:
        return None
    rope_type = scaling.raw("rope_type", scaling.raw("type", None))
    if rope_type != "llama3":
        raise config.fail("rope_scaling", f"the type {rope_type!r} is not implemented; only 'llama3' is")
    values = {key: scaling.positive(key) for key in _LLAMA3_KEYS[:3]}
    if values["low_freq_factor"] >= values["high_freq_factor"]:
        raise scaling.fail("low_freq_factor", f"expected less than high_freq_factor, {values['high_freq_factor']}")
    original = scaling.integer("original_max_position_embeddings")
    return FrozenFields({"rope_type": "llama3", **values, "original_max_position_embeddings": original})


def _moe_specs(config: Fields, backbone: int, count: int) -> dict[int, MoESpec]:
    """The MoESpec of each layer that has experts, by layer number."""
    indices = _moe_layers(config, backbone)
    if not indices:
        return {}
    if config.raw("moe_router_activation") != "sigmoid":
        raise config.fail("moe_router_activation", "only 'sigmoid' scores are implemented")
    experts, top_k = config.integer("moe_num_experts"), config.integer("moe_top_k")
    if top_k > experts:
        raise config.fail("moe_top_k", f"more than the {experts} experts of moe_num_experts")
    limits = _limits(config, "swiglu_limits", count)
    shared = {
        "num_experts": experts,
        "top_k": top_k,
        "expert_size": config.integer("moe_intermediate_size"),
        "shared_size": config.integer("share_expert_dim"),
        "scaling_factor": config.positive("moe_router_scaling_factor"),
        "renormalize": config.flag("norm_expert_weight", True),
        "router_bias": config.flag("use_moe_router_bias"),
        "fp32_router": config.flag("need_fp32_gate", True),
    }
    return {i: MoESpec(**shared, limit=limits[i]) for i in indices}


def _moe_layers(config: Fields, backbone: int) -> list[int]:
    """`moe_layers_enum`: "3,4,5" or a list. MTP layers are always dense, so only backbone layers count."""
    if not config.flag("use_moe", True):
        return []
    value = config.raw("moe_layers_enum")
    parts = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    try:
        if not isinstance(parts, (list, tuple)) or any(type(part) not in (int, str) for part in parts):
            raise ValueError
        indices = sorted({int(part) for part in parts})
    except ValueError:
        raise config.fail("moe_layers_enum", 'expected comma-separated layer numbers such as "3,4,5"') from None
    outside = [i for i in indices if not 0 <= i < backbone]
    if outside:
        raise config.fail("moe_layers_enum", f"layer {outside[0]} is not one of the backbone's 0 to {backbone - 1}")
    return indices


def _limits(config: Fields, name: str, count: int) -> list[float | None]:
    """A per-layer SwiGLU clamp list; absent, null and 0 mean no clamp."""
    limits = config.per_layer_numbers(name, count, lambda v: v >= 0, "expected a clamp of 0 or more", default=None)
    return [limit or None for limit in limits]
