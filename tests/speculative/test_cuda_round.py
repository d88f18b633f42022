"""What a prefill and a round wait for on CUDA, and what a round launches, counted without CUDA."""

from types import SimpleNamespace

import pytest
import torch

from sglang_step35.speculative import device, verify
from tests.support import cuda_host
from tests.support.fake_cuda import fake_cuda

SIZES = [1, 7, 48]


@pytest.fixture
def cuda():
    with fake_cuda() as waits:
        yield waits


def waits_of_a_round(cuda, monkeypatch, size: int, options=None, filters=None, changes=None, **kind) -> list[str]:
    """Of the second round, when everything that is allocated once is there; options: of the requests."""
    worker = cuda_host.make_worker(monkeypatch, **kind)
    requests = cuda_host.make_requests(size, **(options or {}))
    fields = lambda: {"sampling_info": cuda_host.sampling_info(requests, **(filters or {})), **(changes or {})}
    relay = cuda_host.prefill(worker, requests, **fields()).next_draft_input
    relay = cuda_host.round_of(worker, requests, relay, **fields()).next_draft_input
    last = fields()
    cuda.found.clear(), cuda.launched.clear()
    cuda_host.round_of(worker, requests, relay, **last)
    return list(cuda.found)


@pytest.mark.parametrize("size", SIZES)
def test_a_greedy_round_waits_for_nothing(cuda, monkeypatch, size):
    assert waits_of_a_round(cuda, monkeypatch, size) == []


@pytest.mark.parametrize("size", SIZES)
def test_a_sampled_round_waits_for_nothing(cuda, monkeypatch, size):
    assert waits_of_a_round(cuda, monkeypatch, size, {"temperature": 0.8}) == []


@pytest.mark.parametrize("size", SIZES)
def test_penalties_wait_for_nothing(cuda, monkeypatch, size):
    assert waits_of_a_round(cuda, monkeypatch, size, {"penalty": (0.5, 0.2, 1.1), "min_new_tokens": 9}) == []


def test_a_grammar_waits_only_for_the_drafts_it_masks(cuda, monkeypatch):
    """SGLang copies the chain to the host beside the target's forward and waits for that copy alone."""
    asked = []
    monkeypatch.setattr(verify, "GrammarTree", SimpleNamespace(from_linear_chain=lambda ids: asked.append(ids.shape)))
    monkeypatch.setattr(verify, "build_grammar_vocab_mask", lambda **_: None)
    assert waits_of_a_round(cuda, monkeypatch, 7, changes={"has_grammar": True}) == []
    assert asked == [(7, 4)] * 2


@pytest.mark.parametrize("size", SIZES)
def test_filters_wait_for_nothing(cuda, monkeypatch, size):
    for name in ("top_k_renorm_probs", "top_p_renorm_probs"):
        monkeypatch.setattr(f"flashinfer.sampling.{name}", lambda probs, bound: torch.empty_like(probs))
    filters = {f"need_{name}_sampling": True for name in ("top_k", "top_p", "min_p")}
    assert waits_of_a_round(cuda, monkeypatch, size, {"temperature": 0.8}, filters=filters) == []


@pytest.mark.parametrize("plans_on_host", [False, True])
def test_rounds_of_any_depth_wait_for_nothing_and_verify_what_they_drafted(cuda, monkeypatch, plans_on_host):
    """Without a graph of width 3, two drafts are verified by that of the full width."""
    worker = cuda_host.make_worker(monkeypatch, narrow=(1, 2), plans_on_host=plans_on_host)
    requests = cuda_host.make_requests(7)
    relay = cuda_host.prefill(worker, requests).next_draft_input
    for depth in (3, 0, 0, 1, 2, 3, 3):
        cuda.found.clear()
        monkeypatch.setattr(worker.depths, "next_depth", lambda size, owed, depth=depth: depth)
        caught_up = worker.upkeep.lag.of(0) == 0
        relay = cuda_host.round_of(worker, requests, relay).next_draft_input
        assert cuda.found == [] or not caught_up
    assert worker._target_worker.verified == [4, 4, 1, 1, 2, 4, 4]


@pytest.mark.parametrize("mask, built", [(None, True), (True, True), (False, False)])
def test_a_tree_mask_is_built_for_attention_that_reads_one(cuda, monkeypatch, mask, built):
    """Triton's does; one that says nothing may."""
    asked = []
    worker = cuda_host.make_worker(monkeypatch)
    monkeypatch.setattr(
        cuda_host.eagle_worker_common, "build_eagle_verify_input", lambda *_, **more: asked.append(more) or "masked"
    )
    backend = worker._target_worker.model_runner.attn_backend
    backend.verify_mask = None if mask is None else SimpleNamespace(is_read=mask)
    batch = SimpleNamespace(seq_lens=torch.empty(7, dtype=torch.int64, device="cuda"))
    chain = torch.empty(7, 4, dtype=torch.int64, device="cuda")
    found = device.chain_verify_input(batch, worker._target_worker, chain)
    if built:
        assert found == "masked" and asked[0]["num_draft_tokens"] == 4
    else:
        assert found.custom_mask is None and found.positions.shape == (28,) and not asked


# Kernels of ours between the graphs of a round.
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plans_on_host", [False, True])
def test_a_greedy_round_launches_a_few_kernels_outside_its_graphs(cuda, monkeypatch, size, plans_on_host):
    waits_of_a_round(cuda, monkeypatch, size, plans_on_host=plans_on_host)
    assert 10 < len(cuda.launched) <= 24, "\n".join(cuda.launched)


@pytest.mark.parametrize("size", SIZES)
def test_a_sampled_round_launches_a_bounded_number_of_kernels(cuda, monkeypatch, size):
    waits_of_a_round(cuda, monkeypatch, size, {"temperature": 0.8})
    assert 24 < len(cuda.launched) <= 146, "\n".join(cuda.launched)


@pytest.mark.parametrize("size", SIZES)
def test_a_plan_on_the_host_takes_the_lengths_the_scheduler_sends(cuda, monkeypatch, size):
    assert waits_of_a_round(cuda, monkeypatch, size, plans_on_host=True) == []


def test_a_pass_without_graph_reads_the_lengths_once(cuda, monkeypatch):
    """Attention plans it on the host."""
    (wait,) = waits_of_a_round(cuda, monkeypatch, 7, captured=False)
    assert wait.startswith("read by a copy to the host at speculative/draft.py")


@pytest.mark.parametrize("size", SIZES)
def test_a_prefill_waits_for_nothing(cuda, monkeypatch, size):
    worker = cuda_host.make_worker(monkeypatch)
    cuda.found.clear()
    cuda_host.prefill(worker, cuda_host.make_requests(size))
    assert cuda.found == []
