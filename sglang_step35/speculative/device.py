"""The operations of the worker that differ between the portable platform and CUDA."""

import torch
from sglang.srt.platforms import current_platform
from sglang.srt.speculative.eagle_info import EagleVerifyInput
from torch import Tensor

from sglang_step35.speculative.pass_input import MTPPassInput
from sglang_step35.speculative.settings import MTPSettings


def attach_draft_attention(runner) -> None:
    """Give the draft runner the attention backend of its draft-extend passes.

    The portable backend serves every mode; on CUDA each backend has a draft-extend variant.
    """
    if current_platform.is_out_of_tree():
        return
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    steps = runner.model.num_mtp_layers
    factory = DraftBackendFactory(runner, 1, steps, qsa_profile=None)
    runner.attn_backend = factory.create_draft_extend_backend() or runner.attn_backend


def plan_draft_attention(runner, forward_batch, rows: MTPPassInput) -> None:
    """Plan attention once for all MTP layers of a pass."""
    backend = runner.attn_backend
    if hasattr(backend, "plan_rows"):
        backend.plan_rows(forward_batch.req_pool_indices, rows.row_counts, rows.ends_cpu, forward_batch.out_cache_loc)
    else:
        backend.init_forward_metadata(forward_batch)


def writes_kv_alone(runner) -> bool:
    """Whether the runner's attention can write keys and values of rows that attend to nothing.

    SGLang's own backends write them only together with attending.
    """
    return hasattr(runner.attn_backend, "write_kv")


def capture_graphs(runner, settings: MTPSettings):
    """Graphs of the pass of the MTP layers behind a verify step; None where SGLang captures none."""
    if current_platform.is_out_of_tree():
        return None
    from sglang.srt.environ import envs
    from sglang.srt.model_executor.cuda_graph_config import (
        Backend,
        Phase,
        check_cuda_graph_backend,
    )
    from sglang.srt.utils import require_gathered_buffer

    from sglang_step35.speculative.graphs import MTPGraphRunner

    if (
        check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED)
        or envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH.get()
        or require_gathered_buffer()
    ):
        return None
    return MTPGraphRunner(runner, settings)


def host_reads_are_free(device: torch.device) -> bool:
    """Whether the host may read a tensor without waiting for a stream of kernels."""
    return device.type == "cpu"


def verify_width(offered: list[int], widest: int, device: torch.device) -> int:
    """Chain tokens of a verify step for offered[b] drafts of each request.

    On CUDA the window keeps its full width, which the captured graphs need.
    """
    if host_reads_are_free(device):
        return 1 + max(offered, default=widest - 1)
    return widest


def pass_rows(needed: int, captured: int, device: torch.device) -> int:
    """Rows of each request in an MTP pass behind a verify step that needs `needed`.

    On CUDA not fewer than the captured graphs have: those before recompute the KV that is there.
    """
    return needed if host_reads_are_free(device) else max(needed, captured)


def chain_verify_input(batch, target_worker, chain: Tensor) -> EagleVerifyInput:
    """SGLang's verify input for a chain of tokens.

    chain: [B, n] int64, the bonus token and n - 1 drafts (any valid id where none was drafted).
    """
    if current_platform.is_out_of_tree():
        return _portable_verify_input(batch, chain)
    return _cuda_verify_input(batch, target_worker, chain)


def _portable_verify_input(batch, chain: Tensor) -> EagleVerifyInput:
    """A chain needs no tree: attention is causal over the window, so no mask is built."""
    width = chain.shape[1]
    positions = batch.seq_lens[:, None] + torch.arange(width, device=chain.device)
    return EagleVerifyInput(
        draft_token=chain.flatten(),
        custom_mask=None,
        positions=positions.flatten(),
        retrieve_index=None,
        retrieve_next_token=None,
        retrieve_next_sibling=None,
        retrieve_cum_len=None,
        spec_steps=width - 1,
        topk=1,
        draft_token_num=width,
        capture_hidden_mode=None,
        seq_lens_sum=None,
        seq_lens_cpu=None,
    )


def _cuda_verify_input(batch, target_worker, chain: Tensor) -> EagleVerifyInput:
    """SGLang's CUDA kernels build the mask its attention backends read."""
    from sglang.srt.speculative.eagle_info import EagleDraftInput
    from sglang.srt.speculative.eagle_utils import default_tree_mask_mode
    from sglang.srt.speculative.eagle_worker_common import build_eagle_verify_input

    size, width = chain.shape
    steps = width - 1
    parents = torch.arange(-1, steps - 1, device=chain.device).repeat(size, 1)
    order = torch.arange(steps, device=chain.device).repeat(size, 1)
    return build_eagle_verify_input(
        batch,
        EagleDraftInput(bonus_tokens=chain[:, 0]),
        parents if steps > 1 else parents[:, :0],
        order,
        chain[:, 1:].contiguous(),
        None,
        target_worker=target_worker,
        topk=1,
        num_steps=steps,
        num_draft_tokens=width,
        tree_mask_mode=default_tree_mask_mode(),
        device=chain.device,
    )
