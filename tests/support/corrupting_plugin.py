"""A plug-in for tests: the MTP layers' KV of cached prefixes becomes noise, the backbone's stays as it is."""

import torch


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang_step35.speculative.draft.MTPDraftWorker.extend", corrupt, HookType.BEFORE)


def corrupt(worker, batch, *args):
    """Before the MTP pass of a prefill: overwrite what its requests have from the cache."""
    pool, table = worker.draft_runner.token_to_kv_pool, worker.draft_runner.req_to_token_pool.req_to_token
    for req, prefix in zip(batch.reqs, batch.prefix_lens, strict=True):
        slots = table[req.kv.req_pool_idx, : min(prefix, req.cached_tokens)].long()
        for layer, (_, sliding) in pool.layers_mapping.items():
            rows = pool.translate_loc_from_full_to_swa(slots) if sliding else slots
            for buffer in pool.get_kv_buffer(layer):
                buffer[rows] = 3 * torch.randn_like(buffer[rows])
