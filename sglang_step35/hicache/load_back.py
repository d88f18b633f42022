"""Admission of requests whose cached prefix is partly in host memory.

Loading it pins a whole window of sliding slots: those it fills, and those of the same window that are on the device.
SGLang 0.5.23 counts the first alone and goes on to take the others for slots it can evict, so that it admits chunks
for which no slots are left, and dies when it allocates them.
"""

from collections.abc import Callable

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder


def select_admission(
    select: Callable, adder: PrefillAdder, req, *, host_hit_length: int, swa_host_hit_length: int, **options
):
    """Around `PrefillAdder._select_prefill_admission`: count every sliding slot that loading the hit pins.

    Returns the admission, or an AddReqResult where the request has to wait. Where nothing runs that could free a slot,
    it does not wait: it forgets the hit in host memory and computes that part anew.
    """
    tree = adder.tree_cache
    if not (host_hit_length or swa_host_hit_length) or not tree.supports_swa():
        return select(adder, req, host_hit_length=host_hit_length, swa_host_hit_length=swa_host_hit_length, **options)
    pinned = swa_host_hit_length + _pinned_on_device(tree, req.best_match_node)
    found = select(adder, req, host_hit_length=host_hit_length, swa_host_hit_length=pinned, **options)
    # A hit that is only staged from storage SGLang gives up itself (`buffer_pipeline`).
    if found is AddReqResult.NO_TOKEN and _nothing_runs(adder) and tree.buffer_pipeline is None:
        req.host_hit_length = req.swa_host_hit_length = 0
        found = select(adder, req, host_hit_length=0, swa_host_hit_length=0, **options)
    return found


def _pinned_on_device(tree, node) -> int:
    """Sliding slots on the device that could be evicted now and no longer when `node` is locked."""
    before = tree.swa_evictable_size()
    lock = tree.lock(node)
    try:
        return before - tree.swa_evictable_size()
    finally:
        tree.unlock(lock)


def _nothing_runs(adder: PrefillAdder) -> bool:
    running = adder.running_batch
    return not adder.can_run_list and not (running and running.reqs)
