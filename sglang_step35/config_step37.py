"""The text model inside a Step-3.7 config.json: the fields of a Step-3.5 file, one level down.

Step-3.7 is the same language model with a vision encoder beside it (`Step3p7ForConditionalGeneration`). What the outer
level says of the whole checkpoint (quantisation, dtype, token ids) counts where `text_config` is silent; what it says
of images is not read. No SGLang and no torch here.
"""

from collections.abc import Mapping
from typing import Any

from sglang_step35.config_fields import GENERIC_FIELDS, ConfigError
from sglang_step35.names import BACKBONE, STEP37, STEP37_MODEL_TYPE

TEXT = "text_config"
# Of the outer level, besides any file's generic fields; the other token ids there are images'.
_OF_THE_WHOLE = GENERIC_FIELDS | {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}


def text_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The Step-3.5 fields of a config.json: those of a Step-3.7 file's text model, any other file as it stands.

    Raises ConfigError.
    """
    text = fields.get(TEXT)
    if text is None or fields.get("model_type") != STEP37_MODEL_TYPE:
        return fields
    architectures = fields.get("architectures") or [STEP37]
    if architectures != [STEP37]:
        raise ConfigError(f"config field architectures is {architectures!r}: only [{STEP37!r}] has a {TEXT} we know")
    if not isinstance(text, Mapping):
        raise ConfigError(f"config field {TEXT} is a {type(text).__name__}: expected an object")
    whole = {name: value for name, value in fields.items() if name in _OF_THE_WHOLE or name.startswith("_")}
    named = {name: value for name, value in text.items() if value is not None or name not in whole}
    return {**whole, **named, "architectures": [BACKBONE], "model_type": STEP37_MODEL_TYPE}
