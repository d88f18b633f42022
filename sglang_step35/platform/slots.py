"""Bookkeeping of KV slots in plain torch, where SGLang has only a Triton kernel."""

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
