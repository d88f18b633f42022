"""Bookkeeping of request-pool rows in plain torch, where SGLang has only a Triton kernel."""

import torch
from torch import Tensor


def assign_req_to_token(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Write slots into req_to_token[row, start:end] of every request, in place.

    req_pool_indices, start_offset, end_offset: [batch_size]. out_cache_loc: [sum of lengths].
    """
    lengths = (end_offset - start_offset).long()
    rows = req_pool_indices.long().repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    within = torch.arange(len(rows), device=rows.device) - first.repeat_interleave(lengths)
    columns = start_offset.long().repeat_interleave(lengths) + within
    req_to_token[rows, columns] = out_cache_loc.to(req_to_token.dtype)


def gather_spec_extras(
    indices: Tensor,
    topk_p_buf: Tensor,
    topk_index_buf: Tensor,
    output_tokens_buf: Tensor,
    hidden_states_buf: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Rows `indices` [B] of what overlap scheduling relays from one round to the next."""
    hidden = None if hidden_states_buf is None else hidden_states_buf[indices]
    return topk_p_buf[indices], topk_index_buf[indices], output_tokens_buf[indices], hidden
