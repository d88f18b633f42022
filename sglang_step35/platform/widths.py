"""The checkpoint's own widths, where SGLang would pad them for kernels this platform does not have."""

from sglang_step35 import names


def keep_widths(pad, model_config, load_config, tp_size: int):
    """Around `adjust_config_with_unaligned_cpu_tp`: Step-3.5's config as it is, every other model's padded.

    On `--device cpu` ModelRunner rounds `intermediate_size` and `moe_intermediate_size` up to 32 x ranks, and the
    head counts to the ranks, for SGLang's AMX kernels and for models that load padded weights. Plain torch has no such
    need, and our loader compares every tensor with config.json. Ranks that do not divide are refused by
    `model.widths.check_ranks`.
    """
    if names.is_ours(model_config.hf_config):
        return model_config
    return pad(model_config, load_config, tp_size)
