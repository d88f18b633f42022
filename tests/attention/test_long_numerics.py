"""Rotary tables and attention at 100,000 positions and more, on selected rows, without a server.

Letters: T query rows, H query heads, N key/value heads, D head size, r rotated channels.
"""

import json

import pytest
import torch
from transformers.models.step3p7.modeling_step3p7 import Step3p7RotaryEmbedding

from sglang_step35.assets import PUBLISHED_CONFIG
from sglang_step35.attention.portable.kernel_calls import KVReader
from sglang_step35.attention.portable.plan import PassRows, cut_pass
from sglang_step35.config import ALL_KEYS, parse_config
from sglang_step35.model.rotary import QKNormRope, RotaryRows
from tests.support.reference import _transformers_config

CONTEXT = 262144
POSITIONS = torch.tensor([0, 511, 512, 4096, 131071, 131072, 200000, CONTEXT - 1])
LAYERS = {"full_attention": 0, "sliding_attention": 1}
WINDOW, LONG = 511, 131072
SCALE = 0.125


@pytest.fixture(scope="module", params=LAYERS)
def rotary(request):
    """Layer type, our module of that type and transformers' rotary embedding, from the published config."""
    fields = json.loads(PUBLISHED_CONFIG.read_text())
    spec = parse_config(fields)
    attention = spec.layers[LAYERS[request.param]].attention
    rows = RotaryRows()
    ours = QKNormRope(attention, 2, 1, 1e-5, rows)
    return request.param, ours, rows, Step3p7RotaryEmbedding(_transformers_config(fields))


def test_rotary_tables_cover_the_context(rotary):
    _, ours, _, _ = rotary
    assert ours.rope.cos_sin_cache.shape[0] >= CONTEXT
    assert ours.rope.cos_sin_cache.dtype == torch.float32


def test_rotary_rows_equal_transformers(rotary):
    layer_type, ours, _, theirs = rotary
    cos, sin = theirs(torch.zeros(1, dtype=torch.float32), POSITIONS[None], layer_type=layer_type)  # [1, T, r]
    found = ours.rope.cos_sin_cache[POSITIONS]
    half = found.shape[1] // 2
    assert cos.shape[2] == 2 * half
    torch.testing.assert_close(found[:, :half], cos[0, :, :half].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, half:], sin[0, :, :half].float(), atol=1e-5, rtol=0)


def test_rotary_rows_are_as_exact_as_float32_angles_allow(rotary):
    """Against float64 angles: a float32 angle of p radians is off by up to p * 2**-23 or so."""
    layer_type, ours, _, theirs = rotary
    frequencies = getattr(theirs, f"{layer_type}_inv_freq").double()
    angles = POSITIONS.double()[:, None] * frequencies
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1)
    error = (ours.rope.cos_sin_cache[POSITIONS].double() - expected).abs()
    allowed = 1e-6 + POSITIONS.double()[:, None] * torch.cat((frequencies, frequencies), -1) * 2**-22
    assert (error <= allowed).all(), (error / allowed).max()


def test_rotated_queries_and_keys_at_the_end_of_the_context(rotary):
    """The module itself, norms at their initial weight: a rotation of the normed heads by the table's rows."""
    _, ours, rows, _ = rotary
    torch.manual_seed(0)
    for norm in (ours.q_norm, ours.k_norm):
        norm.weight.weight_loader(norm.weight, torch.zeros(ours.head_dim))
    qkv = torch.randn(len(POSITIONS), 4 * ours.head_dim)
    rows.start(POSITIONS)
    q, k, _ = ours.forward_native(POSITIONS, qkv)
    heads = qkv.double().unflatten(1, (4, -1))[:, :3]
    heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    cos, sin = ours.rope.cos_sin_cache[POSITIONS].double().chunk(2, -1)
    half = cos.shape[1]
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
    found = torch.cat((q, k), -1).unflatten(1, (3, -1)).double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def long_request():
    """KV pools of one long request, its slots in runs of 16 in no order; queries of the last 300 rows."""
    torch.manual_seed(1)
    runs = torch.arange(LONG).view(-1, 16)
    table = runs[torch.randperm(len(runs))].view(1, -1)
    return torch.randn(2, LONG, 2, 32), table, torch.randn(300, 4, 32)


@pytest.mark.parametrize("earlier_keys", [ALL_KEYS, WINDOW])
@pytest.mark.parametrize("count", [1, 4, 300])
def test_attention_rows_at_the_end_of_a_long_context(long_request, earlier_keys, count):
    """Decode, verify and a chunk, against dense float64 attention of single rows."""
    pools, table, queries = long_request
    q = queries[-count:].contiguous()
    out = torch.full_like(q, torch.nan)
    rows = PassRows(torch.zeros(1, dtype=torch.int64), [count], [LONG])
    for item in cut_pass(rows, earlier_keys, lambda requests, positions: table[requests, positions]):
        item.run(q, KVReader().of_layer(*pools), SCALE, out)
    for row in {0, count // 2, count - 1}:
        position = LONG - count + row
        first = 0 if earlier_keys < 0 else position - earlier_keys
        k, v = pools[:, table[0, first : position + 1]].double().repeat_interleave(2, 2)
        weights = (torch.einsum("hd,khd->hk", q[row].double(), k) * SCALE).softmax(-1)
        expected = torch.einsum("hk,khd->hd", weights, v)
        torch.testing.assert_close(out[row].double(), expected, atol=1e-5, rtol=1e-4)
