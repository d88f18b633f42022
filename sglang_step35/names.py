"""The names that say which models are ours and what we register; nothing is imported here.

Every question "is this ours?" ends in `is_ours` or `has_mtp_worker`.
"""

MODEL_TYPE = "step3p5"  # `model_type` of config.json
BACKBONE = "Step3p5ForCausalLM"  # `architectures[0]` of config.json
STEP37_MODEL_TYPE = "step3p7"  # of a Step-3.7 file, whose text model we serve
STEP37 = "Step3p7ForConditionalGeneration"
MTP = "Step3p5MTP"  # what SGLang calls the draft model of that architecture
ARCHITECTURES = (BACKBONE, MTP)

PACKAGE = "sglang_step35"
MODEL_PACKAGE = f"{PACKAGE}.model"
PLATFORM = "step35"  # value of SGLANG_PLATFORM
PLATFORM_CLASS = f"{PACKAGE}.platform.portable.PortablePlatform"
ATTENTION_BACKEND = "step35_portable"  # value of --attention-backend
PACKED_METHOD = "packed"  # what our quantisation calls itself
TREE_CORE = "step35_lookahead"
DEPTH_PARAM = "speculative_depth"  # in a request's `custom_params`
GUARDS_PARAM = "guards"  # there too, and in an answer's `meta_info`


def is_ours(config) -> bool:
    """Whether we serve the model of this Hugging Face config, backbone or draft."""
    return _architecture(config) in ARCHITECTURES


def has_mtp_worker(config) -> bool:
    """Whether our speculative worker serves this target model."""
    return _architecture(config) == BACKBONE


def is_our_code(item) -> bool:
    """Whether a class or function comes from this package."""
    return item.__module__.startswith(f"{PACKAGE}.")


def _architecture(config) -> str | None:
    return (config.architectures or [None])[0]
