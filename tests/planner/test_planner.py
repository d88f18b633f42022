"""Weights, KV pools and capacity against values worked out by hand from the published config.json."""

import json
import math
import struct

import pytest

from sglang_step35.assets import NANO
from sglang_step35.cli.plan import load
from sglang_step35.planner import GIB, PlanError, weights
from sglang_step35.planner.capacity import Slots, cached_prompts, concurrency, longest, sliding_ratio
from sglang_step35.planner.kv import kv_layout, pool_sizes, sized
from sglang_step35.planner.weights import GGUF_Q4_K_S_BYTES, active_parameters, device_weights, parameters

SPEC, _ = load(None)
TINY, _ = load(str(NANO))
EAGLE = Slots(window=514, page_size=1, draft_tokens=4, chunk=8192)


# --- Weights --------------------------------------------------------------------------------------------------------

FULL_ATTENTION = 2 * 4096 * 64 * 128 + 2 * 4096 * 8 * 128 + 4096 * 64  # q and o, k and v, g
SLIDING_ATTENTION = 2 * 4096 * 96 * 128 + 2 * 4096 * 8 * 128 + 4096 * 96
EXPERT = 3 * 4096 * 1280
DENSE = 3 * 4096 * 11264
VOCABULARY = 128896 * 4096


def test_parameters_of_each_part():
    count = parameters(SPEC)
    assert count.embedding == count.head == VOCABULARY == 527_958_016
    assert count.attention == 12 * FULL_ATTENTION + 33 * SLIDING_ATTENTION == 4_520_804_352
    assert count.dense == 3 * DENSE == 415_236_096
    assert count.routed == 42 * 288 * EXPERT == 190_253_629_440
    assert count.shared == 42 * EXPERT == 660_602_880
    assert count.router == 42 * (288 * 4096 + 288) == 49_557_312
    assert count.norms == 45 * (2 * 4096 + 2 * 128) + 4096 == 384_256
    assert count.mtp == 3 * (SLIDING_ATTENTION + DENSE + 2 * 4096 * 4096 + 5 * 4096 + 2 * 128) == 844_296_960
    assert count.mtp_heads == count.mtp_embeddings == 3 * VOCABULARY == 1_583_874_048


def test_totals_agree_with_the_published_ones():
    count = parameters(SPEC)
    assert count.backbone == 196_956_130_368  # "196B"
    assert count.checkpoint == 199_384_301_376  # the hub counts 199.4B in the files
    assert count.shared_vocabulary == count.backbone + count.mtp
    # "11B active": attention, norms, dense, shared, routers, head and 8 of 288 experts; not the embedding.
    rest = 4_520_804_352 + 384_256 + 415_236_096 + 660_602_880 + 49_557_312 + 527_958_016
    assert active_parameters(SPEC) == rest + 42 * 8 * EXPERT == 11_459_365_952


def test_nano_checkpoint_has_the_parameters_counted():
    with (NANO / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    stored = sum(math.prod(tensor["shape"]) for tensor in header.values())
    assert parameters(TINY).shared_vocabulary == stored  # without heads of their own for the MTP layers


def test_bf16_bytes_on_one_of_eight_devices():
    held = device_weights(SPEC, "bf16", tp=8)
    assert held.embedding == held.head == 527_958_016 * 2 // 8
    assert held.attention == 4_520_804_352 * 2 // 8
    assert held.dense == 103_809_024
    assert held.routed == 47_563_407_360
    assert held.shared == 165_150_720
    assert held.router == 42 * (288 * 4096 + 288) * 4  # whole on every device, in float32
    assert held.norms == 384_256 * 2
    # A sharded layer, and eh_proj and norms whole.
    assert held.mtp == 3 * (27_361_280 + 34_603_008 + 67_108_864 + 41_472)
    assert held.shared_vocabulary == 49_812_888_832  # 46.39 GiB
    assert held.checkpoint - held.shared_vocabulary == 3 * 131_989_504
    assert held.stock - held.shared_vocabulary == 6 * 131_989_504


def test_stock_copies_weigh_a_gigabyte_each_on_one_device():
    held = device_weights(SPEC)
    assert held.mtp_heads == held.mtp_embeddings == 3 * 1_055_916_032


def test_quantised_experts():
    # E4M3 with a float32 scale for each of 10 x 32 blocks of three matrices.
    assert device_weights(SPEC, "fp8").routed == 42 * 288 * (EXPERT + 3 * 320 * 4) == 190_300_078_080
    # 4 bit with a bf16 scale for each 128 inputs: 1280 x 32 groups twice, 4096 x 10 once.
    assert device_weights(SPEC, "int4").routed == 42 * 288 * (EXPERT // 2 + 3 * 40_960 * 2) == 98_099_527_680
    assert device_weights(SPEC, "fp8", tp=4).routed == 47_575_019_520
    rest = device_weights(SPEC).shared_vocabulary - device_weights(SPEC).routed
    for quantization in ("fp8", "int4"):
        held = device_weights(SPEC, quantization)
        assert held.shared_vocabulary - held.routed == rest  # everything else stays in bf16
    assert device_weights(SPEC, "int4").backbone == 111_603_644_160
    assert GGUF_Q4_K_S_BYTES == 111_500_000_000  # given, and close to it


def test_q4_k_s_is_the_published_file():
    """Without MTP layers, within the few matrices that llama.cpp gives Q5_K."""
    held = device_weights(SPEC, "gguf", mtp=False)
    assert held.shared_vocabulary == pytest.approx(GGUF_Q4_K_S_BYTES, rel=0.004)
    assert held.routed == 190_253_629_440 * 144 // 256 and held.head == VOCABULARY * 210 // 256


def test_kv_projections_are_copied_beyond_the_kv_heads():
    eight, sixteen = device_weights(SPEC, tp=8).attention, device_weights(SPEC, tp=16).attention
    kv = 45 * 2 * 4096 * 8 * 128 * 2  # bytes of all k and v projections
    assert sixteen - eight / 2 == kv / 16


def test_without_mtp_only_the_backbone_is_held():
    held = device_weights(SPEC, mtp=False)
    assert held.mtp == held.mtp_heads == held.mtp_embeddings == 0
    assert held.shared_vocabulary == held.backbone == held.stock


def test_partial_scale_blocks_count_whole():
    assert weights._quantised_bytes(32, 160, "fp8") == 32 * 160 + 1 * 2 * 4
    assert weights._quantised_bytes(32, 160, "int4") == 32 * 160 // 2 + 32 * 2 * 2
    assert weights._quantised_bytes(32, 160, "int8") == 32 * 160 + 32 * 2


# --- KV layout and pools --------------------------------------------------------------------------------------------


def test_kv_bytes_for_a_token():
    layout = kv_layout(SPEC)
    assert (layout.full_layers, layout.sliding_layers, layout.mtp_layers, layout.window) == (12, 33, 3, 512)
    assert layout.full_token == layout.sliding_token == 2 * 8 * 128 * 2 == 4096
    assert (layout.full_cell, layout.sliding_cell) == (12 * 4096, 36 * 4096)
    assert layout.mtp_share == 3 / 36
    assert kv_layout(SPEC, mtp=False).sliding_cell == 33 * 4096
    assert kv_layout(SPEC, element_bytes=4).full_token == 8192


@pytest.mark.parametrize(
    ("tp", "token", "copies"), [(1, 4096, 1), (4, 1024, 1), (8, 512, 1), (16, 512, 2), (32, 512, 4)]
)
def test_kv_heads_are_copied_when_tp_exceeds_them(tp: int, token: int, copies: int):
    layout = kv_layout(SPEC, tp)
    assert (layout.full_token, layout.replication) == (token, copies)


def test_request_bytes_stop_growing_with_the_window_in_sliding_layers():
    layout = kv_layout(SPEC)
    assert layout.request_bytes(100) == 100 * 48 * 4096
    assert layout.request_bytes(262_144) == 262_144 * 49_152 + 512 * 147_456
    assert layout.request_bytes(262_144, chunk=512) == 262_144 * 49_152 + 1024 * 147_456


def test_pool_sizes_on_eight_devices():
    # 12 x 512 for a full slot, 36 x 512 for a sliding one: 6144 + 0.8 x 18432 = 20889.6 bytes; 10 GiB hold 514007.9.
    pools = pool_sizes(SPEC, 10 * GIB, tp=8)
    assert (pools.full_tokens, pools.sliding_tokens) == (514_007, 411_205)
    assert pools.full_bytes == 514_008 * 6144  # one padding slot
    assert pools.sliding_bytes == 411_206 * 33 * 512
    assert pools.mtp_bytes == 411_206 * 3 * 512
    assert 10 * GIB - 25_000 < pools.total_bytes < 10 * GIB + 25_000
    # 10 GiB / (6144 + 0.8 x 16896) = 546133.3, without the MTP layers' share.
    assert pool_sizes(SPEC, 10 * GIB, tp=8, mtp=False).full_tokens == 546_133


def test_pool_sizes_are_whole_pages():
    pools = pool_sizes(SPEC, 10 * GIB, tp=8, page_size=16)
    assert (pools.full_tokens, pools.sliding_tokens) == (32_125 * 16, 25_700 * 16)
    assert pools.full_bytes == (514_000 + 16) * 6144


def test_pool_sizes_of_nano():
    # 2 full layers, 6 sliding, 3 MTP, 2 heads x 32 channels: 256 bytes; 2 x 256 + 0.8 x 9 x 256 = 2355.2 bytes.
    pools = pool_sizes(TINY, 10_000_000)
    assert (pools.full_tokens, pools.sliding_tokens) == (4245, 3396)
    assert (pools.full_bytes, pools.sliding_bytes, pools.mtp_bytes) == (4246 * 512, 3397 * 1536, 3397 * 768)


def test_pool_without_room_for_a_window_is_refused():
    layout = kv_layout(SPEC)
    assert sized(layout, 642).sliding_tokens == 513  # 512 would not do: 511 earlier tokens and a page of 1
    with pytest.raises(PlanError, match="pool of 512 tokens cannot hold 511 earlier ones.*--swa-full-tokens-ratio"):
        sized(layout, 641)


# --- Capacity -------------------------------------------------------------------------------------------------------


def test_slots_of_a_request():
    assert EAGLE.reserve == 8  # two rounds of 4
    assert kv_layout(SPEC).retained == 514 and kv_layout(SPEC, mtp=False).retained == 511
    assert EAGLE.sliding == 514 + 128 * 4 + 1 + 8 == 1035
    assert EAGLE.prefill == 2 * 8192 + 1
    assert (EAGLE.full(1000), Slots(512, 64, 4, 8192).full(1000)) == (1008, 1024)
    assert Slots(511, 1, 1, 8192).sliding == 511 + 128 + 1 + 1  # without speculation
    assert EAGLE.running_pool(48, 262_144) == 48 * 1035 + 16_385 == 66_065
    assert EAGLE.running_pool(48, 100) == 48 * 108 + 16_385  # short requests never fill a window
    assert EAGLE.tails(48) == 4 * 48 * 515


def test_concurrency_is_the_lesser_of_both_pools():
    layout = kv_layout(SPEC, tp=8)
    pools = sized(layout, 1_000_000, swa_ratio=0.1)  # sliding: 100000 - 16385 = 83615, 80 requests of 1035
    assert concurrency(pools, EAGLE, 100_000) == 9  # 1000000 / 100008
    assert concurrency(pools, EAGLE, 5_000) == 80
    assert concurrency(pools, EAGLE, 92) == 836  # 83615 / 100
    assert cached_prompts(pools, EAGLE, 10) == (83_615 - 10_350) // 515 == 142


def test_longest_request():
    pools = sized(kv_layout(SPEC, tp=8), 1_000_000, swa_ratio=0.1)
    assert longest(pools, EAGLE, 1, 262_144) == 262_144
    assert longest(pools, EAGLE, 10, 262_144) == 100_000 - 8
    assert longest(pools, EAGLE, 100, 262_144) == 836 - 8  # 83615 sliding slots for 100
    assert longest(pools, EAGLE, 100_000, 262_144) == 0
    for requests in (1, 7, 10, 80, 100, 836):
        tokens = longest(pools, EAGLE, requests, 262_144)
        assert concurrency(pools, EAGLE, tokens) >= requests


def test_sliding_ratio_is_the_smallest_that_serves():
    layout = kv_layout(SPEC, tp=8)
    # 66065 + 98880 slots of 18432 bytes; the rest of 16927185955 bytes is 2260240.8 full slots of 6144: 0.07298.
    assert sliding_ratio(16_927_185_955, layout, EAGLE, 48, 262_144) == 0.073
    # 2 GiB hold 66065 sliding slots and 151330.3 full ones: 0.4366; not the cached prompts' 98880 as well.
    assert sliding_ratio(2 * GIB, layout, EAGLE, 48, 262_144) == 0.437
    assert sliding_ratio(GIB, layout, EAGLE, 48, 262_144) == 1.0
