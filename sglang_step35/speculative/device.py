"""The operations of the worker that differ between the portable platform and CUDA."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from sglang.srt.platforms import current_platform
from sglang.srt.speculative.eagle_info import EagleVerifyInput
from torch import Tensor

from sglang_step35.speculative.host_copy import host_reads_are_free
from sglang_step35.speculative.pass_input import MTPPassInput
from sglang_step35.speculative.ranks import Ranks
from sglang_step35.speculative.settings import MTPSettings

if TYPE_CHECKING:
    from sglang_step35.speculative.verify_graphs import NarrowSteps
    from sglang_step35.speculative.window import WindowReader


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


def capture_graphs(runner, settings: MTPSettings, reader: "WindowReader"):
    """Graphs of the pass of the MTP layers behind a verify step; None where SGLang captures none."""
    from sglang.srt.environ import envs

    if not _captures_decode_graphs() or envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH.get():
        return None
    from sglang_step35.speculative.graphs import MTPGraphRunner

    return MTPGraphRunner(runner, settings, reader)


def capture_narrow_steps(narrow: "NarrowSteps", settings: MTPSettings, ranks: Ranks) -> None:
    """Graphs of the verify steps that adaptive depth makes narrower than the full width, where that one has any."""
    if not settings.adaptive or not _captures_decode_graphs():
        return
    if narrow.runner.decode_cuda_graph_runner is not None:  # there is none on a server for prefills alone
        narrow.capture(settings.narrow_widths, ranks)


def _captures_decode_graphs() -> bool:
    """Whether SGLang captures decode graphs, and of batches as the worker sees them."""
    if current_platform.is_out_of_tree():
        return False
    from sglang.srt.model_executor.cuda_graph_config import (
        Backend,
        Phase,
        check_cuda_graph_backend,
    )
    from sglang.srt.utils import require_gathered_buffer

    return not check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED) and not require_gathered_buffer()


def keeps_states_by_slot(device: torch.device | str, target_worker, hierarchical_cache: bool) -> bool:
    """Whether every KV slot keeps the backbone's hidden state, from which the MTP layers' KV can be computed later.

    On CUDA each rank would hold all of it, more than its share of the KV. A hierarchical cache moves KV between slots
    without a word. Layers that see all positions would have to be computed for all.
    """
    return host_reads_are_free(torch.device(device)) and target_worker.is_hybrid_swa and not hierarchical_cache


def rounds_heads(runner, spec) -> bool:
    """Whether drafts are chosen by copies of the heads in fewer bits.

    On CPUs, whose rounds take as long as reading their weights. Float32 keeps every draft exact, and so does
    `--speculative-draft-model-quantization unquant`, which SGLang resolves to None.
    """
    kept = spec._speculative_draft_quantization_explicitly_set and spec.speculative_draft_model_quantization is None
    return host_reads_are_free(torch.device(runner.device)) and runner.dtype is not torch.float32 and not kept


def eager_rows(device: torch.device | str) -> int:
    """Rows from which on an eager pass of the MTP layers costs about the same a row.

    On CPUs reading the weights is then less than multiplying by them; on CUDA launching the kernels costs so much that
    the fewer passes the better.
    """
    return 256 if host_reads_are_free(torch.device(device)) else sys.maxsize


def round_clock(device: torch.device | str) -> Callable[[], float]:
    """Seconds to time rounds by.

    On CPUs the work is done in the scheduler's own thread, and what other processes do meanwhile says nothing about it.
    """
    return time.thread_time if host_reads_are_free(torch.device(device)) else time.perf_counter


def greedy_choice(logits: Tensor) -> Tensor:
    """The likeliest token of each row: logits [.., V] -> [..] int64. On CPUs by numpy, in a tenth of torch's time."""
    if not host_reads_are_free(logits.device):
        return logits.argmax(-1)
    return torch.from_numpy(logits.float().numpy().argmax(-1))


def verify_width(needed: int, narrow: "NarrowSteps", device: torch.device) -> int:
    """Chain tokens of a verify step that needs `needed`: on CUDA as many as some captured graph has."""
    return needed if host_reads_are_free(device) else narrow.width(needed)


def window_width(verified: int, widest: int, device: torch.device) -> int:
    """Positions behind the committed length that a round remembers and its MTP pass ends with.

    On CUDA those of the full width however many were verified, so that the pass replays its graphs: rows past them are
    as worthless as those of rejected drafts.
    """
    return verified if host_reads_are_free(device) else widest


def pass_rows(needed: int, captured: int, device: torch.device) -> int:
    """Rows of each request in an MTP pass behind a verify step that needs `needed`.

    On CUDA not fewer than the captured graphs have: those before recompute the KV that is there.
    """
    return needed if host_reads_are_free(device) else max(needed, captured)


def chain_verify_input(batch, target_worker, chain: Tensor) -> EagleVerifyInput:
    """SGLang's verify input for a chain of tokens.

    chain: [B, n] int64, the bonus token and n - 1 drafts (any valid id where none was drafted).
    """
    if current_platform.is_out_of_tree() or _needs_no_mask(target_worker.model_runner.attn_backend):
        return _causal_verify_input(batch, chain)
    return _masked_verify_input(batch, target_worker, chain)


def _needs_no_mask(backend) -> bool:
    """Whether a backend says that its verify step reads no mask of the tree: fa3's and ours on FlashInfer, not
    Triton's."""
    mask = backend.verify_mask
    return mask is not None and not mask.is_read


def _causal_verify_input(batch, chain: Tensor) -> EagleVerifyInput:
    """A chain needs no tree: attention is causal over the window, so no mask is built."""
    width = chain.shape[1]
    positions = batch.seq_lens
    if width > 1:
        positions = (positions[:, None] + torch.arange(width, device=chain.device)).flatten()
    return EagleVerifyInput(
        draft_token=chain.flatten(),
        custom_mask=None,
        positions=positions,
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


def _masked_verify_input(batch, target_worker, chain: Tensor) -> EagleVerifyInput:
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
