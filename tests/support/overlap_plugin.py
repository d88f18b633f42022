"""A plug-in for tests: overlap scheduling with speculation on a CPU, as CUDA has it.

SGLang switches it off there, rightly: on a CPU nothing overlaps, and results arrive a round later. The
worker must bear it all the same.
"""

import torch


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    switch = "sglang.srt.arg_groups.speculative_hook._disable_overlap_schedule_for_cpu"
    gather = "sglang.srt.managers.overlap_utils.gather_spec_extras"
    HookRegistry.register(switch, lambda server_args: None, HookType.REPLACE)
    HookRegistry.register(gather, gather_spec_extras, HookType.REPLACE)


def gather_spec_extras(
    indices: torch.Tensor,
    topk_p_buf: torch.Tensor,
    topk_index_buf: torch.Tensor,
    output_tokens_buf: torch.Tensor,
    hidden_states_buf: torch.Tensor | None,
):
    """What SGLang's Triton kernel gathers: rows `indices` of each buffer."""
    hidden = None if hidden_states_buf is None else hidden_states_buf[indices]
    return topk_p_buf[indices], topk_index_buf[indices], output_tokens_buf[indices], hidden
