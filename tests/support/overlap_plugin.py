"""A plug-in for tests: overlap scheduling with speculation on a CPU, as CUDA has it.

SGLang switches it off there, rightly: on a CPU nothing overlaps, and results arrive a round later. The
worker must bear it all the same.
"""

from pathlib import Path

import torch


def install_into(directory: Path) -> None:
    """Make `directory`, on PYTHONPATH, a place from which SGLang loads this plug-in."""
    info = directory / "step35_overlap_on_cpu-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: step35-overlap-on-cpu\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\noverlap = overlap_plugin:register\n")
    (directory / "overlap_plugin.py").write_text(Path(__file__).read_text())


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
