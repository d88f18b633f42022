"""Host integers on the device, by one copy that the host does not wait for; and what it may read of the device."""

from collections.abc import Sequence

import torch
from sglang.srt.utils import async_h2d
from torch import Tensor


def to_device(*lists: Sequence[int], device: torch.device) -> list[Tensor]:
    """The lists as int64 tensors, views of one."""
    flat = async_h2d([value for values in lists for value in values], dtype=torch.int64, device=device)
    return list(flat.split([len(values) for values in lists]))


def host_reads_are_free(device: torch.device) -> bool:
    """Whether the host may read a tensor without waiting for a stream of kernels."""
    return device.type == "cpu"
