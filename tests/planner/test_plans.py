"""Reserves, parallel sizes and whole plans against values worked out by hand."""

import pytest

from sglang_step35.cli.plan import load
from sglang_step35.planner import GIB, MIB, PlanError
from sglang_step35.planner.elsewhere import judge
from sglang_step35.planner.hardware import MACHINES, custom, host, machine
from sglang_step35.planner.parallel import check_tp, choose_ep
from sglang_step35.planner.plan import Wish, make_plan
from sglang_step35.planner.reserve import fixed, prefill_graphs, sglang_default, tight

SPEC, _ = load(None)


# --- What SGLang keeps free -----------------------------------------------------------------------------------------


def test_reserve_of_an_h100_among_eight():
    assert prefill_graphs(8192) == 58 and prefill_graphs(2048) == 42
    reserve = sglang_default(81_559, tp=8)
    assert reserve.mib == 512 + 8192 * 1.5 + 1024 + 512 * 2 + 58 * 8 == 15_312
    assert (reserve.mem_fraction_static, reserve.chunk, reserve.graph_batch, reserve.tight) == (0.812, 8192, 512, False)
    assert sglang_default(81_559, tp=8, max_running_requests=16).mib == 15_312 - 2 * (512 - 16)


def test_reserve_follows_the_size_of_the_device():
    assert sglang_default(16_000, tp=1).mib == 512 + 2048 * 1.5 + 128 + 8 * 2 + 42 * 8
    assert sglang_default(24_000, tp=4).graph_batch == 160
    assert sglang_default(200_000, tp=1).chunk == 16_384
    assert sglang_default(70_000, tp=1, max_running_requests=1).mib == 512 + 12_288 + 128 + 2 + 464
    assert fixed(100_000, 1, 0.9).mib == pytest.approx(10_000)


def test_tight_reserve():
    reserve = tight(128e9 / MIB, tp=1, max_running_requests=1)
    assert reserve.mib == 512 + 3072 + 128 + 2 + 336 == 4050
    assert (reserve.mem_fraction_static, reserve.chunk, reserve.tight) == (0.967, 2048, True)


# --- Parallel sizes -------------------------------------------------------------------------------------------------


def test_tensor_parallel_sizes():
    assert [tp for tp in range(1, 65) if _allowed(tp)] == [1, 2, 4, 8, 16, 32]
    with pytest.raises(PlanError, match="--tp 8: more than the 4 device"):
        check_tp(SPEC, 8, 4)
    with pytest.raises(PlanError, match="--tp 3: does not divide the 64 query heads"):
        check_tp(SPEC, 3, 8)


def _allowed(tp: int) -> bool:
    try:
        return check_tp(SPEC, tp, 64) == tp
    except PlanError:
        return False


def test_expert_parallel_keeps_scale_blocks_whole():
    assert choose_ep(SPEC, "bf16", 8, None) == 1
    assert choose_ep(SPEC, "fp8", 2, None) == 1  # 640 channels, five blocks
    assert choose_ep(SPEC, "fp8", 4, None) == 4  # 320 channels are two and a half
    assert choose_ep(SPEC, "int4", 8, None) == 8
    assert choose_ep(SPEC, "int4", 1, None) == 1
    with pytest.raises(PlanError, match="--ep 1: --tp 4 cuts experts of width 1280 into 320.*use --ep 4"):
        choose_ep(SPEC, "fp8", 4, 1)
    with pytest.raises(PlanError, match="--ep 2: SGLang takes 1 or the tensor-parallel size, 8"):
        choose_ep(SPEC, "bf16", 8, 2)
    with pytest.raises(PlanError, match="--ep 64: does not divide the 288 routed experts"):
        choose_ep(SPEC, "bf16", 64, 64)


# --- Plans ----------------------------------------------------------------------------------------------------------


def test_plan_of_eight_h100():
    plan = make_plan(SPEC, MACHINES["8xh100"], Wish())
    assert plan.free == 81_559 * MIB - int(1.1 * GIB) - 2 * GIB == 82_192_210_330
    assert plan.budget == int(82_192_210_330 * 0.812) - 49_812_888_832 == 16_927_185_955
    best, stock = plan.best, plan.stock
    assert (best.running, best.swa_ratio, best.budget) == (48, 0.073, 16_927_185_955)
    # 16927185955 / (6144 + 0.073 x 18432) and / (6144 + 0.8 x 18432)
    assert (best.pools.full_tokens, best.pools.sliding_tokens) == (2_260_111, 164_988)
    assert (stock.pools.full_tokens, stock.pools.sliding_tokens) == (810_316, 648_252)
    assert [best.concurrency(tokens) for tokens in (8192, 131_072, 262_144)] == [48, 17, 8]
    assert [stock.concurrency(tokens) for tokens in (8192, 131_072, 262_144)] == [48, 6, 3]
    assert plan.fits and plan.served_context == 262_144
    assert not make_plan(SPEC, MACHINES["8xh100"], Wish(concurrency=100)).fits


def test_plan_of_four_h200_in_fp8():
    plan = make_plan(SPEC, MACHINES["4xh200"], Wish())
    assert (plan.quantization, plan.tp, plan.ep) == ("fp8", 4, 4)
    # 14800 MiB of 143771 not touched: 0.897.
    assert plan.best.reserve.mem_fraction_static == 0.897
    assert plan.budget == int((143_771 * MIB - int(1.1 * GIB) - 2 * GIB) * 0.897) - plan.resident
    assert plan.best.concurrency(262_144) == 23


def test_dgx_spark_needs_a_tight_reserve_and_a_shorter_context():
    plan = make_plan(SPEC, MACHINES["dgx-spark"], Wish())
    assert plan.resident == 113_292_238_080  # 105.5 of 119.2 GiB
    assert plan.budget < 0  # with SGLang's own reserve nothing is left
    assert plan.best.reserve.tight and plan.best.running == 1
    free = 128 * 10**9 - 4 * GIB - int(1.1 * GIB)
    assert plan.best.budget == int(free * 0.967) - 113_292_238_080
    assert not plan.fits
    assert plan.longest(1) == plan.best.pools.full_tokens - 8 == 83_901
    assert plan.served_context == 81 * 1024
    assert make_plan(SPEC, MACHINES["dgx-spark"], Wish(context=65_536)).fits


def test_plan_without_room():
    plan = make_plan(SPEC, custom(8, 48, "bf16"), Wish())
    assert (plan.best, plan.fits, plan.longest(1)) == (None, False, 0)


def test_wishes_are_kept():
    wish = Wish(swa_ratio=0.5, mem_fraction_static=0.7, page_size=64, mtp=False, concurrency=2, context=4096)
    plan = make_plan(SPEC, MACHINES["8xh200"], wish)
    assert (plan.best.swa_ratio, plan.best.reserve.mem_fraction_static, plan.best.running) == (0.5, 0.7, 2)
    assert plan.best.pools.full_tokens % 64 == 0
    assert plan.layout.mtp_layers == 0 and plan.best.slots.draft_tokens == 1


def test_machines_without_sglang():
    judgement = judge(SPEC, machine("mac-studio"), None, None)
    assert judgement.kv == 262_144 * 49_152 + 1024 * 147_456 == 13_035_896_832
    assert judgement.needed == 111_500_000_000 + 13_035_896_832 + 2 * GIB
    assert judgement.fits and not judgement.fits_as_shipped
    assert (judgement.usable, judgement.usable_as_shipped) == (120 * GIB, 96 * GIB)
    with pytest.raises(PlanError, match="llama.cpp only"):
        make_plan(SPEC, machine("mac-studio"), Wish())
    with pytest.raises(PlanError, match="--quantization fp8: not on Mac"):
        judge(SPEC, machine("mac-studio"), "fp8", None)


# --- The portable platform ------------------------------------------------------------------------------------------


def test_gguf_on_a_cpu_with_128_gb():
    plan = make_plan(SPEC, machine("ai-max-395"), Wish())
    assert plan.free == 128 * GIB - 8 * GIB - int(1.5 * GIB)
    # Q4_K but for the head, norms and routers; three MTP layers in Q4_K.
    assert plan.resident == pytest.approx((196_956_130_368 + 844_296_960) * 144 / 256, rel=0.004)
    assert plan.best.reserve.tight and plan.best.running == 1 and not plan.fits
    states = 16_384 * 4096 * 2  # hidden states
    assert plan.best.budget == int(plan.free * 0.969) - plan.resident - states
    assert 210_000 < plan.longest(1) < 220_000
    assert make_plan(SPEC, machine("ai-max-395"), Wish(context=131_072)).fits
    assert make_plan(SPEC, machine("x86-128gb"), Wish()).fits


@pytest.mark.parametrize(
    ("quantization", "memory", "longest"),
    # 125 GiB: 115.4 of 119.5 GiB for weights and KV; 49152 bytes a token after 7,400 sliding slots of 147456.
    [("gguf", 96, 0), ("gguf", 125, 235_000), ("int4", 125, 197_400), ("fp8", 125, 0), ("int8", 256, 262_144),
     ("bf16", 256, 0), ("bf16", 512, 262_144)],
)  # fmt: skip
def test_what_fits_a_cpu(quantization, memory, longest):
    plan = make_plan(SPEC, host(memory), Wish(quantization=quantization))
    assert plan.longest(1) == pytest.approx(longest, rel=0.01)
    assert (plan.machine.engine, plan.tp) == ("portable", 1)


def test_unified_memory_serves_gguf_from_the_cpu():
    plan = make_plan(SPEC, machine("dgx-spark"), Wish(quantization="gguf", context=65_536))
    assert plan.machine.engine == "portable" and plan.machine.attention is None and plan.fits
    with pytest.raises(PlanError, match="--quantization gguf: .*have not been tried on CUDA"):
        make_plan(SPEC, machine("8xh100"), Wish(quantization="gguf"))


def test_a_cpu_keeps_what_no_request_can_use():
    """Four contexts of 1000 tokens on a machine that could hold thousands."""
    plan = make_plan(SPEC, host(512), Wish(quantization="gguf", context=1000, concurrency=4))
    assert plan.fits and plan.best.pools.total_bytes <= plan.best.budget
    # Four requests, two chunks in flight and four cached windows for each.
    assert plan.best.budget < 4040 * 49_152 + (4040 + 4097 + 16 * 515) * 147_456
