"""Attention over a pool of K and V in plain torch, and what stands in for CUDA graphs: a callable that runs again."""

from contextlib import nullcontext

import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

SLOTS = 128


class PoolAttention:
    """Row by row; slot 0 takes what nobody reads. plans: the calls that would plan a kernel, in order."""

    dllm_attention = None

    def __init__(self, req_to_token):
        self.req_to_token = req_to_token
        self.pools = {}
        self.plans = []

    def forward(self, q, k, v, layer, batch, **_unused):
        dim = layer.head_dim
        q, k, v = (x.view(len(q), -1, dim) for x in (q, k, v))
        keys, values = self.pools.setdefault(layer.layer_id, (self.filled(k), self.filled(v)))
        keys[batch.out_cache_loc], values[batch.out_cache_loc] = k, v
        owners = batch.req_pool_indices.repeat_interleave(len(q) // batch.batch_size)
        rows = []
        for query, owner, position in zip(q, owners, batch.positions.tolist(), strict=True):
            first = max(0, position - layer.sliding_window_size) if layer.sliding_window_size >= 0 else 0
            slots = self.req_to_token[owner, first : position + 1]
            groups = len(query) // k.shape[1]
            scores = torch.einsum("hd,thd->ht", query, keys[slots].repeat_interleave(groups, 1))
            weights = (scores * layer.scaling).softmax(-1)
            rows.append(torch.einsum("ht,thd->hd", weights, values[slots].repeat_interleave(groups, 1)))
        return torch.stack(rows).flatten(1)

    @staticmethod
    def filled(like):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(SLOTS, *like.shape[1:], generator=generator)

    def init_forward_metadata(self, batch):
        self.plans.append("eager")

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        self.plans.append(("state", max_bs, max_num_tokens))

    def init_forward_metadata_out_graph(self, batch, in_capture=False):
        self.plans.append(("capture" if in_capture else "replay", batch.batch_size))

    def init_forward_metadata_in_graph(self, batch):
        pass

    def get_cuda_graph_seq_len_fill_value(self):
        return 1

    def draft_extend_metadata_captured_in_graph(self):
        return False

    def shared_read_ends(self, mode):
        return SharedReadEnds.UNKNOWN


class Recorder:
    """In place of SGLang's graph backend."""

    def __init__(self):
        self.recorded = {}

    def capture_one(self, key, run, post_warmup_hook=None, **_unused):
        run()
        self.recorded[key] = run

    def replay(self, key, batch):
        return self.recorded[key]()

    def replay_session(self):
        return nullcontext()
