"""The memory that captured MTP passes read. Letters: B requests, W rows per request, L token-line entries per request,
H hidden size.
"""

from dataclasses import dataclass, fields
from types import SimpleNamespace

import torch
from sglang.srt.model_executor.input_buffers import ForwardInputBuffers
from torch import Tensor

from sglang_step35.speculative.pass_input import MTPPassInput


@dataclass
class PassBuffers(ForwardInputBuffers):
    """What captured passes of up to B requests read; see `MTPPassInput` for the indices.

    positions, out_cache_loc, base: [B W] int64. line: [B L] int64. last: [B] int64.
    hidden_states: [B W, H], the backbone's, then every layer's output.
    req_pool_indices, seq_lens, extend_seq_lens: [B]. seq_lens_cpu: [B] on the host.
    """

    positions: Tensor
    out_cache_loc: Tensor
    base: Tensor
    line: Tensor
    last: Tensor
    hidden_states: Tensor
    req_pool_indices: Tensor
    seq_lens: Tensor
    extend_seq_lens: Tensor
    seq_lens_cpu: Tensor

    @classmethod
    def allocate(cls, size: int, width: int, num_layers: int, hidden_size: int, dtype, device) -> "PassBuffers":
        """For `size` requests of `width` rows each."""
        with torch.device(device):
            rows = torch.zeros(size * width, dtype=torch.int64)
            requests = torch.zeros(size, dtype=torch.int64)
            return cls(
                positions=rows.clone(),
                out_cache_loc=rows.clone(),
                base=rows.clone(),
                line=torch.zeros(size * (width + num_layers), dtype=torch.int64),
                last=requests.clone(),
                hidden_states=torch.zeros(size * width, hidden_size, dtype=dtype),
                req_pool_indices=requests.clone(),
                seq_lens=torch.full_like(requests, width),
                extend_seq_lens=torch.full_like(requests, width, dtype=torch.int32),
                seq_lens_cpu=torch.full((size,), width, dtype=torch.int64, device="cpu"),
            )

    def load(self, rows: MTPPassInput, hidden: Tensor, req_pool_indices: Tensor, size: int) -> None:
        """Fill in a pass, padded to `size` requests whose rows go to SGLang's dummy slot 0."""
        width = rows.row_counts[0]
        values = {
            "positions": rows.positions,
            "out_cache_loc": rows.slots,
            "base": rows.base,
            "line": rows.line,
            "last": rows.last,
            "hidden_states": hidden,
            "req_pool_indices": req_pool_indices,
            "seq_lens": rows.ends,
        }
        if rows.ends_cpu is not None:
            values["seq_lens_cpu"] = rows.ends_cpu
        count = len(rows.row_counts)
        for name, value in values.items():
            buffer = getattr(self, name)
            per_request = len(value) // count
            buffer[: len(value)].copy_(value)
            padding = buffer[len(value) : size * per_request]
            padding.fill_(width if name.startswith("seq_lens") else 0)

    def first(self, size: int) -> SimpleNamespace:
        """The views that passes of `size` requests read."""
        total = len(self.last)
        buffers = {field.name: getattr(self, field.name) for field in fields(self)}
        return SimpleNamespace(**{name: buffer[: size * (len(buffer) // total)] for name, buffer in buffers.items()})
