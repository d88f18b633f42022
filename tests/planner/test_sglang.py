"""The planner's arithmetic against SGLang's own code, which it repeats, and against a running server."""

import argparse
import random
import re
from types import SimpleNamespace

import pytest
import requests

from sglang_step35.assets import NANO
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from sglang_step35.cli.plan import load
from sglang_step35.planner import GIB, PlanError
from sglang_step35.planner.capacity import Slots
from sglang_step35.planner.command import serve_arguments
from sglang_step35.planner.hardware import LLAMA_CPP, MACHINES, SGLANG, host
from sglang_step35.planner.kv import kv_layout, pool_sizes, sized
from sglang_step35.planner.plan import Wish, make_plan
from sglang_step35.planner.reserve import sglang_default
from sglang_step35.planner.stored import read
from tests.support.gguf_files import write_gguf

SPEC, _ = load(None)
TINY, _ = load(str(NANO))


@pytest.mark.parametrize("mtp", [True, False])
def test_pool_sizes_are_sglangs(mtp: bool):
    from sglang.srt.model_executor.pool_configurator import HybridSWAPoolConfigurator

    pick = random.Random(1)
    for spec, most in ((SPEC, 200 * GIB), (TINY, GIB)):
        for _ in range(100):
            tp, page, ratio = pick.choice([1, 2, 4]), pick.choice([1, 16, 64]), pick.choice([0.8, 1.0, 0.073, 0.3])
            budget, layout = pick.randrange(1 << 20, most), kv_layout(spec, tp, mtp)
            theirs = HybridSWAPoolConfigurator.__new__(HybridSWAPoolConfigurator)
            theirs.__dict__.update(
                _full_per_token=layout.full_token, _swa_per_token=layout.sliding_token,
                _full_layers_num=layout.full_layers, _swa_layers_num=layout.sliding_layers,
                _draft_full_layers_num=0, _draft_swa_layers_num=layout.mtp_layers, _draft_swa_full_layers_num=0,
                _draft_cell_size=0, _fused_full_entry=None, _fused_swa_entry=None, _enable_unified_memory=False,
                _swa_full_tokens_ratio=ratio, _sliding_window_size=layout.window - 1, _page_size=page,
            )  # fmt: skip
            theirs._recompute_cell_size()
            try:
                config = theirs.calculate_pool_sizes(budget, page)
                expected = (config.full_max_total_num_tokens, config.swa_max_total_num_tokens)
            except ValueError:
                expected = None
            try:
                pools = pool_sizes(spec, budget, tp=tp, mtp=mtp, page_size=page, swa_ratio=ratio)
                assert (pools.full_tokens, pools.sliding_tokens) == expected
            except PlanError:
                assert expected is None


def test_pool_bytes_are_sglangs():
    import torch
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    theirs = SWAKVPool(
        size=4240, size_swa=3392, page_size=16, dtype=torch.bfloat16, head_num=2, head_dim=32, device="cpu",
        swa_attention_layer_ids=list(TINY.sliding_layer_ids), full_attention_layer_ids=list(TINY.full_layer_ids),
    )  # fmt: skip
    mine = pool_sizes(TINY, 10_000_000, page_size=16)
    assert (mine.full_tokens, mine.sliding_tokens) == (theirs.size, theirs.size_swa)
    assert mine.full_bytes + mine.sliding_bytes == sum(theirs.get_kv_size_bytes())


def test_sliding_slots_are_sglangs(monkeypatch):
    from sglang.srt.model_executor import pool_configurator

    spec = SimpleNamespace(speculative_num_draft_tokens=4, speculative_algorithm="EAGLE")
    schedule = SimpleNamespace(disable_overlap_schedule=False, chunked_prefill_size=8192, max_running_requests=48)
    monkeypatch.setattr(pool_configurator, "get_spec", lambda: spec)
    monkeypatch.setattr(pool_configurator, "get_schedule", lambda: schedule)
    monkeypatch.setattr(pool_configurator, "get_disagg", lambda: SimpleNamespace(disaggregation_mode="null"))
    monkeypatch.setattr(pool_configurator, "get_alloc_len_per_decode", lambda: 4)
    for page in (1, 64):
        theirs = pool_configurator.compute_swa_request_cap(page_size=page, window=512, attn_dp_size=1)
        assert Slots(512, page, 4, 8192).running_pool(48, 262_144) == theirs
    spec.speculative_algorithm, spec.speculative_num_draft_tokens = None, None
    theirs = pool_configurator.compute_swa_request_cap(page_size=1, window=512, attn_dp_size=1)
    assert Slots(512, 1, 1, 8192).running_pool(48, 262_144) == theirs


@pytest.mark.parametrize(
    ("memory", "tp", "running"),
    [(81_559, 8, None), (143_771, 4, 32), (143_771, 2, None), (122_070, 1, 1), (48_000, 4, None), (24_000, 1, None),
     (16_000, 1, None), (200_000, 8, 64)],
)  # fmt: skip
def test_reserve_is_sglangs(monkeypatch, memory: int, tp: int, running: int | None):
    """Run handle_gpu_memory_settings on a bare namespace, with its lookups of platform and model cut off."""
    from sglang.srt.arg_groups import cuda_graph_hook, memory_hook
    from sglang.srt.arg_groups.model_overrides import qwen3_vl
    from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig

    for module in (memory_hook, cuda_graph_hook):
        monkeypatch.setattr(module, "resolving_view", lambda args: args)
        monkeypatch.setattr(module, "resolved_view", lambda args: args)
    answers = {
        "get_device_memory_capacity": lambda device: memory,
        "declare_resolution": lambda args, step, **values: args.__dict__.update(values),
        "model_config_of": lambda args: SimpleNamespace(is_multimodal=False),
        "post_capture_kv_sizing_planned": lambda args: False,  # SGLANG_ENABLE_POST_CAPTURE_KV_SIZING is off
        "use_mla_backend": lambda args: False,
        "attn_dp_enabled_of": lambda args: False,
        "get_platform": lambda: SimpleNamespace(is_xpu=False),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(memory_hook, name, answer)
    monkeypatch.setattr(qwen3_vl, "expand_multimodal_decode_graph_to_running_limit", lambda *args: None)
    graphs = CudaGraphConfig(decode=PhaseConfig(backend=Backend.FULL), prefill=PhaseConfig(backend=Backend.BREAKABLE))
    args = SimpleNamespace(
        device="cuda", tp_size=tp, pp_size=1, max_running_requests=running, cuda_graph_config=graphs,
        chunked_prefill_size=None, mem_fraction_static=None, max_total_tokens=None, model_path="",
        disaggregation_mode="null", language_only=False, language_model_only=False, moe_a2a_backend="none",
        speculative_algorithm="EAGLE", disable_cuda_graph_padding=False, enable_symm_mem=False,
    )  # fmt: skip
    memory_hook.handle_gpu_memory_settings(args)
    mine = sglang_default(memory, tp, running)
    theirs = (args.mem_fraction_static, args.chunked_prefill_size, args.cuda_graph_config.decode.max_bs)
    assert (mine.mem_fraction_static, mine.chunk, mine.graph_batch) == theirs


def test_commands_parse_with_sglangs_own_parser():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for machine in MACHINES.values():
        if machine.engine == LLAMA_CPP:
            continue
        plan = make_plan(SPEC, machine, Wish(page_size=16))
        args = parser.parse_args(serve_arguments(plan)[1:])
        assert (args.tp_size, args.ep_size, args.page_size) == (plan.tp, plan.ep, 16)
        assert args.device == (None if machine.engine == SGLANG else "cpu")
        assert args.swa_full_tokens_ratio == plan.best.swa_ratio
        assert args.speculative_num_draft_tokens == 4 and args.enable_multi_layer_eagle
        if plan.best.reserve.tight:
            assert args.mem_fraction_static == plan.best.reserve.mem_fraction_static
            assert args.chunked_prefill_size == (plan.best.reserve.chunk if machine.engine == SGLANG else None)


@pytest.mark.server
def test_pools_of_a_running_nano_server(serve):
    """What the server reports in /server_info and logs, within 1 %."""
    server = serve(*NANO_ARGS, *MTP_ARGS)
    info = requests.get(f"{server.url}/server_info", timeout=60).json()
    usage = info["internal_states"][0]["memory_usage"]
    pools = sized(kv_layout(TINY), usage["token_capacity"], info["page_size"], info["swa_full_tokens_ratio"])
    assert pools.full_tokens == usage["token_capacity"]
    assert pools.sliding_tokens == pytest.approx(usage["token_capacity_swa"], rel=0.01)
    # The backbone's pools, in GiB rounded to thousandths; the log has the MTP layers' too, rounded to hundredths.
    assert usage["kvcache"] == pytest.approx((pools.full_bytes + pools.sliding_bytes) / GIB, rel=0.01, abs=0.0005)
    backbone, mtp = re.findall(r"SWAKVPool mem usage: ([\d.]+) GB", server.log.read_text())
    assert float(backbone) == pytest.approx(usage["kvcache"], abs=0.0051)
    assert float(mtp) == pytest.approx(pools.mtp_bytes / GIB, rel=0.01, abs=0.0051)
    if info["max_total_tokens"] is None:
        # All of them come out of one budget.
        shared = pool_sizes(TINY, int((usage["kvcache"] + float(mtp)) * GIB), page_size=info["page_size"])
        assert shared.full_tokens == pytest.approx(usage["token_capacity"], rel=0.01)


@pytest.mark.server
def test_a_gguf_server_takes_what_the_plan_says(serve, tmp_path_factory):
    """Nano in Q8_0, started with the plan's own command: two contexts of 2000 tokens and no more."""
    file = tmp_path_factory.mktemp("planned") / "nano-Q8_0.gguf"
    write_gguf(NANO, file)
    spec, stored = read(str(file))
    plan = make_plan(spec, host(16), Wish(context=2000, concurrency=2), stored)
    flags = serve_arguments(plan, str(file))
    server = serve(*flags[1 : flags.index("--host")])
    state = requests.get(f"{server.url}/server_info", timeout=60).json()["internal_states"][0]
    usage, pools = state["memory_usage"], plan.best.pools
    assert usage["token_capacity"] == pools.full_tokens and usage["token_capacity_swa"] == pools.sliding_tokens
    assert usage["kvcache"] == pytest.approx((pools.full_bytes + pools.sliding_bytes) / GIB, rel=0.02, abs=0.0005)
    assert server.generate("def add(", max_new_tokens=8)["meta_info"]["completion_tokens"] == 8
