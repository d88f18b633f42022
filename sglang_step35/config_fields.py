"""Checked reads from a config.json mapping: one helper per kind of value, one table per kind of field.

Every helper raises `ConfigError` with the field's name, the value found and what to do about it, so that `config.py`
reads like the list of fields it needs. No SGLang and no torch here.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


class ConfigError(ValueError):
    """A config field this plug-in cannot serve; the message names the field, its value and what to do."""


class FrozenFields(Mapping):
    """A small read-only, hashable, picklable mapping; `dict(fields)` gives a copy to hand to other libraries."""

    __slots__ = ("_items",)
    _items: tuple[tuple[str, Any], ...]

    def __init__(self, fields: Mapping[str, Any]):
        object.__setattr__(self, "_items", tuple(sorted(fields.items())))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("FrozenFields is read-only")

    def __getitem__(self, key: str) -> Any:
        for name, value in self._items:
            if name == key:
                return value
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __reduce__(self):
        return (FrozenFields, (dict(self._items),))

    def __repr__(self) -> str:
        return f"FrozenFields({dict(self._items)!r})"


# Fields `parse_config` reads.
READ_FIELDS = frozenset(
    """
    hidden_size intermediate_size num_hidden_layers vocab_size num_attention_heads num_attention_groups head_dim
    rms_norm_eps max_position_embeddings bos_token_id eos_token_id pad_token_id tie_word_embeddings
    layer_types sliding_window attention_other_setting use_head_wise_attn_gate
    rope_theta rope_scaling yarn_only_types partial_rotary_factors use_rope_layers
    use_moe moe_layers_enum moe_num_experts moe_top_k moe_intermediate_size share_expert_dim norm_expert_weight
    moe_router_activation moe_router_scaling_factor use_moe_router_bias need_fp32_gate
    swiglu_limits swiglu_limits_shared num_nextn_predict_layers
    """.split()
)

# Fields that only have one supported value: (value, why another one is refused). Absent means the value given here.
FIXED_FIELDS: dict[str, tuple[Any, str]] = {
    "zero_centered": (True, "the RMSNorms scale by 1 + weight; convert the norm weights by subtracting 1"),
    "use_qk_norm": (True, "queries and keys are always normalised; a checkpoint without q_norm and k_norm is another"),
    "sink": (False, "attention sinks are not implemented; the published checkpoints have none"),
    "att_impl_type": ("GQA", "only grouped-query attention is implemented"),
    "hidden_act": ("silu", "the feed-forward layers are SwiGLU with silu"),
    "attention_bias": (False, "the projections have no bias; a checkpoint with biases is another model"),
    "mlp_bias": (False, "the projections have no bias; a checkpoint with biases is another model"),
}

# Fields of the published file, and of StepFun's config class, that say nothing this plug-in needs to know. SGLang takes
# the default context length from the `max_seq_len` of its list, or from one of the other names for it.
IGNORED_FIELDS = frozenset(
    """
    max_seq_len max_sequence_length model_max_length seq_length
    auto_map moe_every_n_layer moe_layer_offset moe_dynamic_exp_p initializer_range use_cache
    attention_dropout
    """.split()
)

# Fields any transformers config.json may carry.
GENERIC_FIELDS = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version quantization_config compression_config
    name_or_path return_dict output_hidden_states output_attentions torchscript use_bfloat16 pruned_heads
    chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention
    tie_encoder_decoder finetuning_task id2label label2id num_labels problem_type tokenizer_class prefix
    sep_token_id decoder_start_token_id task_specific_params attn_implementation experts_implementation
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tf_legacy_loss
    """.split()
)

# `config_unknown` decides what becomes of the rest.
KNOWN_FIELDS = READ_FIELDS | FIXED_FIELDS.keys() | IGNORED_FIELDS | GENERIC_FIELDS

_REQUIRED = object()  # default of the helpers below: the field must be there


class Fields:
    """Read-only view of one mapping; `prefix` names the mapping in messages ("rope_scaling.")."""

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._values = values
        self._prefix = prefix

    def fail(self, name: str, why: str) -> ConfigError:
        """The error to raise for `name`, with the value found."""
        return ConfigError(f"config field {self._prefix}{name} is {self._values.get(name)!r}: {why}")

    def raw(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value as it stands; null counts as absent."""
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"config field {self._prefix}{name} is missing: copy it from the published config.json")
        return default

    def integer(self, name: str, minimum: int = 1, default: Any = _REQUIRED) -> Any:
        """A whole number of at least `minimum`; neither true/false, nor "8", nor 8.0."""
        value = self.raw(name, default)
        if value is default:
            return value
        if type(value) is not int:
            raise self.fail(name, f"expected a whole number, got {type(value).__name__}; write it without quotes")
        if value < minimum:
            raise self.fail(name, f"expected at least {minimum}")
        return value

    def positive(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number above zero."""
        return self._checked_number(name, self.raw(name, default), lambda v: v > 0, "expected a number above 0")

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """true or false, nothing that merely behaves like it."""
        value = self.raw(name, default)
        if type(value) is not bool:
            raise self.fail(name, f"expected true or false, got {type(value).__name__}")
        return value

    def table(self, name: str, known: Iterable[str]) -> "Fields | None":
        """A nested mapping with `known` keys only, or None when absent.

        A key too many is refused here: a stamp goes to the top level, inside a table every key has a meaning.
        """
        value = self.raw(name, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.fail(name, f"expected an object with the keys {', '.join(sorted(known))}")
        nested = Fields(value, f"{self._prefix}{name}.")
        nested.reject_unknown(known)
        return nested

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.raw(name, ())
        ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if any(type(token) is not int or token < 0 for token in ids):
            raise self.fail(name, "expected a token id or a list of token ids, all 0 or more")
        return ids

    def per_layer(self, name: str, count: int, default: Any = _REQUIRED, scalar: bool = False) -> tuple[Any, ...]:
        """The first `count` entries of a per-layer list.

        count: backbone plus MTP layers. The list may be longer: a checkpoint whose num_nextn_predict_layers was
        lowered keeps its lists. With `scalar` one number stands for all layers.
        """
        value = self.raw(name, default)
        if value is default:
            return (value,) * count
        if scalar and not isinstance(value, (list, tuple)):
            return (value,) * count
        if not isinstance(value, (list, tuple)):
            raise self.fail(name, f"expected a list with one entry per layer, got {type(value).__name__}")
        if len(value) < count:
            raise ConfigError(
                f"config field {self._prefix}{name} has {len(value)} entries: expected at least {count}, one for each "
                "of the num_hidden_layers + num_nextn_predict_layers layers; restore the uncut list of the published "
                "config.json, or lower num_nextn_predict_layers"
            )
        return tuple(value[:count])

    def per_layer_numbers(
        self, name: str, count: int, valid: Callable[[float], bool], expected: str, **options: Any
    ) -> tuple[Any, ...]:
        """`per_layer` for numbers; entries that are null stay None where `default` is None."""
        entries = self.per_layer(name, count, **options)
        optional = options.get("default", _REQUIRED) is None
        return tuple(
            None if value is None and optional else self._checked_number(name, value, valid, f"{expected} at entry {i}")
            for i, value in enumerate(entries)
        )

    def _checked_number(self, name: str, value: Any, valid: Callable[[float], bool], expected: str) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.fail(name, f"{expected}, got {value!r}, which is no finite number")
        if not valid(value):
            raise self.fail(name, f"{expected}, got {value!r}")
        return float(value)

    def require_fixed(self, table: Mapping[str, tuple[Any, str]]) -> None:
        """Refuse every value of `table`'s fields but the supported one."""
        for name, (supported, why) in table.items():
            if self.raw(name, supported) != supported or type(self.raw(name, supported)) is not type(supported):
                wanted = "remove it" if supported is None else f"only {supported!r} is supported"
                raise self.fail(name, f"{wanted}; {why}")

    def unknown(self, known: Iterable[str]) -> list[str]:
        """Keys outside `known`; names starting with an underscore are transformers' own."""
        known = set(known)
        return [str(key) for key in self._values if key not in known and not str(key).startswith("_")]

    def reject_unknown(self, known: Iterable[str]) -> None:
        """Refuse keys outside `known`."""
        for key in self.unknown(known):
            near = difflib.get_close_matches(key, set(known), n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it, or use a checkpoint of this architecture"
            raise ConfigError(f"config field {self._prefix}{key} is unknown: {hint}")
