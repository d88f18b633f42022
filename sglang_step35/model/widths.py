"""Which tensor-parallel sizes cut a checkpoint into whole parts."""

from collections.abc import Iterator

from sglang.srt.runtime_context import get_exec, get_parallel

from sglang_step35.config import ModelSpec
from sglang_step35.config_fields import ConfigError


def check_ranks(spec: ModelSpec) -> None:
    """Refuse ranks that cut a head or a channel of this checkpoint, before SGLang asserts so without a name.

    The vocabulary is padded by SGLang and a shared expert that does not divide stays whole; neither is checked.
    Raises ConfigError with the field and the sizes that serve the checkpoint.
    """
    ranks = get_parallel()
    for name, size, count in _parts(spec, ranks.attn_tp_size, ranks.tp_size, ranks.moe_tp_size):
        if not _divides(name, size, count):
            usable = [n for n in range(1, ranks.tp_size) if all(_divides(*part) for part in _parts(spec, n, n, n))]
            raise ConfigError(
                f"config field {name} is {size}: does not divide by --tp-size {ranks.tp_size}"
                f"{'' if count == ranks.tp_size else f', here {count} ranks'}; "
                f"use --tp-size {', '.join(map(str, usable))}"
            )


def check_expert_ranks(experts: int) -> None:
    """Refuse --ep-size that does not divide the experts, before SGLang asserts so. Raises ConfigError."""
    ranks, copies = get_parallel().ep_size, get_exec().moe.ep_num_redundant_experts
    if (experts + copies) % ranks:
        raise ConfigError(
            f"config field moe_num_experts is {experts}"
            f"{f', with --ep-num-redundant-experts {copies}' if copies else ''}: does not divide by --ep-size {ranks}"
        )


def _parts(spec: ModelSpec, attention: int, dense: int, experts: int) -> Iterator[tuple[str, int, int]]:
    """(field of config.json, its value, the ranks it is cut over), for ranks of the three kinds of part."""
    for layer in (*spec.layers, *spec.mtp_layers):
        table = "" if layer.attention.window is None else "attention_other_setting."
        yield f"{table}num_attention_heads", layer.attention.num_heads, attention
        yield f"{table}num_attention_groups", layer.attention.num_kv_heads, attention
        if layer.moe is None:
            yield "intermediate_size", layer.dense_size, dense
        else:
            yield "moe_intermediate_size", layer.moe.expert_size, experts


def _divides(name: str, size: int, ranks: int) -> bool:
    # Fewer key/value heads than ranks are copied, if evenly.
    return size % ranks == 0 or (name.endswith("groups") and ranks % size == 0)
