"""One rank of a small cluster on the CPU: runs the model on given prompts and saves what it computed.

Run by tests/model/test_ranks.py, one process for each rank.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from sglang.srt.layers import dp_attention
from sglang.srt.model_executor import forward_batch_info
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_step35.model import draft_heads, moe
from sglang_step35.platform.portable import PortablePlatform
from tests.support import model_host


def rank_main(rank: int, directory: Path, output: Path, port: int, prompts: list[list[int]], mode: str) -> None:
    """Run one of the modes below; rank r of data-parallel attention takes prompts[r], others prompts[0]."""
    settings = {
        "tp": dict(tp_size=2),
        "whole_shared_expert": dict(tp_size=2),
        "ep": dict(tp_size=2, ep_size=2),
        "dp": dict(tp_size=2, dp_size=2, enable_dp_attention=True),
        "pp": dict(pp_size=2),
    }[mode]
    if mode == "dp":
        # Refused on CPUs; here the layers are tried that GPUs would run.
        PortablePlatform.apply_server_args_defaults = lambda *_: None
    place = dict(tp_rank=0, pp_rank=rank) if mode == "pp" else dict(tp_rank=rank, pp_rank=0)
    model_host.start_runtime(directory, port, place, **settings)
    if mode == "whole_shared_expert":
        moe._cannot_shard = lambda *_: True  # as an FP8 checkpoint's block size would ask for
    backbone = model_host.load(directory)
    assert not backbone.model.runs_single_rank
    if mode == "pp":
        saved = _pipeline(backbone, prompts[0], output / "between")
    elif mode == "dp":
        saved = _data_parallel(rank, backbone, model_host.load(directory, draft=True), prompts)
    else:
        out = model_host.run(backbone, prompts[0])
        mtp = model_host.load(directory, draft=True)
        mtp.share_with(backbone)
        saved = out.next_token_logits, out.hidden_states, model_host.mtp_logits(mtp, out.hidden_states, prompts[0])
        if mode == "tp":
            torch.save(_by_rounded_heads(directory, out.hidden_states, prompts[0]), output / f"rounded {rank}")
    if saved is not None:
        torch.save(saved, output / str(rank))


def _by_rounded_heads(directory: Path, hidden: torch.Tensor, ids: list[int]) -> list[torch.Tensor]:
    """The MTP layers' logits in bfloat16, each rank's part of the heads in 8 bits."""
    draft_heads.LARGE = 1
    backbone, mtp = (model_host.load(directory, draft=draft, dtype="bfloat16") for draft in (False, True))
    mtp.share_with(backbone)
    assert mtp.tables.round_heads() == 3
    return model_host.mtp_logits(mtp, hidden.bfloat16(), ids)


def _pipeline(backbone, ids: list[int], between: Path):
    """The first rank leaves its tensors in a file for the second."""
    batch = model_host.batch_of(ids)
    context = ForwardContext(attn_backend=model_host.WholeSequence())
    with torch.inference_mode(), forward_context(context, forward_batch=batch):
        if backbone.pp_group.is_first_rank:
            torch.save(dict(backbone(batch.input_ids, batch.positions, batch).tensors), between)
            return dist.barrier()
        dist.barrier()
        proxies = forward_batch_info.PPProxyTensors(torch.load(between))
        out = backbone(batch.input_ids, batch.positions, batch, pp_proxy_tensors=proxies)
    return out.next_token_logits, out.hidden_states, []


def _data_parallel(rank: int, backbone, mtp, prompts: list[list[int]]):
    dp_attention.memcpy = _copy_rows  # SGLang's is a Triton kernel
    counts = [len(ids) for ids in prompts]
    batch = _synchronised(prompts[rank], counts, [1, 1])
    context = ForwardContext(attn_backend=model_host.WholeSequence())
    with torch.inference_mode(), forward_context(context, forward_batch=batch):
        out = backbone(batch.input_ids, batch.positions, batch)
    mtp.share_with(backbone)
    hidden, logits = out.hidden_states, []
    for depth in range(mtp.num_mtp_layers):
        rows = [count - 1 - depth for count in counts]
        batch = _synchronised(prompts[rank][depth + 1 :], rows, rows)
        with torch.inference_mode(), forward_context(context, forward_batch=batch):
            hidden = mtp.forward_layer(depth, batch.input_ids, batch.positions, hidden[: rows[rank]], batch)
            logits.append(mtp.compute_logits(depth, hidden, batch))
    return out.next_token_logits, out.hidden_states, logits


def _synchronised(ids: list[int], counts: list[int], logit_rows: list[int]):
    """A batch that knows the other rank's token counts, as the scheduler would make it."""
    batch = model_host.batch_of(ids)
    batch.global_num_tokens_cpu = batch.global_num_tokens_padded_cpu = counts
    batch.global_num_tokens_gpu = torch.tensor(counts)
    batch.global_num_tokens_for_logprob_cpu = logit_rows
    batch.global_num_tokens_for_logprob_gpu = torch.tensor(logit_rows)
    batch.global_dp_buffer_len, batch.is_extend_in_batch = sum(counts), True
    batch.dp_padding_mode = dp_attention.DpPaddingMode.SUM_LEN
    forward_batch_info.set_dp_buffer_len_from_batch(batch)
    dp_attention.set_is_extend_in_batch(True)
    return batch


def _copy_rows(target, source, dim, offset, size, offset_source) -> None:
    start, count = int(offset), int(size)
    if offset_source:
        target[:count].copy_(source[start : start + count])
    else:
        target[start : start + count].copy_(source[:count])
