"""Bookkeeping of KV slots on CPUs, where SGLang has only a Triton kernel."""

import numpy as np
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
    first, end = start_offset.numpy(), end_offset.numpy()
    lengths = end - first
    rows = np.repeat(req_pool_indices.numpy(), lengths)
    columns = np.arange(len(rows)) + np.repeat(end - lengths.cumsum(), lengths)
    req_to_token.numpy()[rows, columns] = out_cache_loc.numpy()
