"""The transformers-side config classes of `model_type: step3p5` and `step3p7`, and where they must be registered.

transformers and SGLang both own these model types. transformers' class cuts the per-layer lists and makes
`num_attention_heads` raise on a plain `hasattr`; SGLang's cannot be saved again. `Step35HFConfig` keeps every field as
the file has it and checks the file once with `parse_config`. SGLang is imported only inside `register_with_sglang`.
"""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from sglang_step35.checkpoint.gguf_config import config_fields
from sglang_step35.checkpoint.gguf_names import ARCHITECTURE as GGUF_ARCHITECTURE
from sglang_step35.config import FULL, SLIDING, ModelSpec, parse_config
from sglang_step35.config_fields import FIXED_FIELDS, IGNORED_FIELDS, READ_FIELDS, ConfigError
from sglang_step35.config_step37 import text_fields
from sglang_step35.config_unknown import FOREIGN_FIELDS, MEANINGFUL
from sglang_step35.names import MODEL_TYPE, STEP37_MODEL_TYPE


class Step35HFConfig(PretrainedConfig):
    """A Step-3.5 config.json as attributes: same names, same values, lists uncut.

    What is kept from transformers: loading, saving, dtype, architectures and the other generic fields. What is
    replaced: the RoPE rewriting (`rope_theta` and `rope_scaling` stay as they are) and the layer-count validation.
    The properties below answer what SGLang's ModelConfig asks and the file says under other names.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_key_value_heads": "num_attention_groups"}

    # The base class turns this name into an alias of `rope_parameters`; a plain attribute takes its place.
    rope_scaling = None

    # Read by transformers and SGLang whether or not the file has them; the published one has no pad_token_id.
    bos_token_id = None
    eos_token_id = None
    pad_token_id = None

    def __init__(self, **fields: Any):
        """fields: the mapping of config.json; none at all gives an empty config. Raises ConfigError.

        Unknown keys become attributes and are saved again.
        """
        if fields:
            parse_config(fields)
        for name in fields.keys() - MEANINGFUL:
            ours = None if name.startswith("_") else getattr(type(self), name, None)
            if callable(ours) or isinstance(ours, property):  # the value would hide it, or could not be set
                raise ConfigError(f"config field {name} is unknown, and the config class uses the name: remove it")
        # SGLang looks for a null `text_config` and its like with hasattr.
        fields = {name: value for name, value in fields.items() if name not in FOREIGN_FIELDS or value is not None}
        own = READ_FIELDS | FIXED_FIELDS.keys() | IGNORED_FIELDS
        # Given to the base class, these would be normalised, dropped or validated against num_hidden_layers.
        super().__init__(**{name: value for name, value in fields.items() if name not in own})
        for name in fields.keys() & own:
            setattr(self, name, fields[name])

    @classmethod
    def from_gguf(cls, path: str) -> "Step35HFConfig":
        """The config of a GGUF file, from its metadata. Raises DamagedFile, ConfigError."""
        config = cls(**config_fields(path))
        config._name_or_path = str(path)
        return config

    def spec(self) -> ModelSpec:
        """The checked view of this config as it stands now, with overrides made after loading."""
        return parse_config(self)

    def validate(self) -> None:
        """What transformers calls before saving; its own check wants num_hidden_layers == len(layer_types)."""
        self.spec()

    @property
    def num_attention_heads_per_layer(self) -> list[int]:
        """Query heads of every listed layer: SGLang sizes attention buffers by the largest."""
        heads = {FULL: self.num_attention_heads, SLIDING: self._sliding("num_attention_heads")}
        return [heads[layer_type] for layer_type in self.layer_types]

    @property
    def swa_num_key_value_heads(self) -> int:
        """Key/value heads of the sliding layers: the shape of SGLang's sliding-window pool."""
        return self._sliding("num_attention_groups")

    @property
    def swa_head_dim(self) -> int:
        """Channels of a sliding layer's head."""
        return self._sliding("head_dim")

    def _sliding(self, name: str) -> int:
        other = getattr(self, "attention_other_setting", None) or {}
        return other.get(name, getattr(self, name))


class Step37HFConfig(Step35HFConfig):
    """The text model of a Step-3.7 config.json: a Step-3.5 config, for SGLang a model without images."""

    model_type = STEP37_MODEL_TYPE

    def __init__(self, **fields: Any):
        super().__init__(**text_fields({**fields, "model_type": STEP37_MODEL_TYPE}) if fields else {})


def register_hf_config() -> None:
    """Make `AutoConfig` build our classes for their model types. May be called again."""
    for config in (Step35HFConfig, Step37HFConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_with_sglang() -> None:
    """Make SGLang's `get_config` end in our classes. May be called again.

    SGLang reads the file with AutoConfig first (transformers' class dies there) and then once more with the class its
    own registry holds for the model type, so both must be ours. The registry is one dict shared by its importers, and
    so is the one of builders for GGUF files without a config.json beside them.
    """
    from sglang.srt.utils.hf_transformers import common, gguf_native

    register_hf_config()
    common._CONFIG_REGISTRY |= {MODEL_TYPE: Step35HFConfig, STEP37_MODEL_TYPE: Step37HFConfig}
    gguf_native.GGUF_NATIVE_CONFIG_BUILDERS[GGUF_ARCHITECTURE] = Step35HFConfig.from_gguf
