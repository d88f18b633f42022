"""The KV a CPU server keeps when its flags do not say: from the memory that is free, and no more than can be used."""

from types import SimpleNamespace

import pytest

from sglang_step35.assets import NANO
from sglang_step35.planner import GIB, MIB
from sglang_step35.platform import kv_default
from sglang_step35.platform.kv_default import max_total_tokens
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.gguf_files import write_gguf

# Nano: 2 full layers and 6 sliding ones, 3 MTP layers, 2 KV heads of 32 channels in 2 bytes.
FULL, SLIDING, MTP = 2 * 256, 6 * 256, 3 * 256
SERVER = 1.5 * GIB  # the processes
RESERVE = 4.1 * GIB  # SGLang's reserve of activations for one to 48 requests and chunks of 2048 tokens, at most


@pytest.fixture
def free(monkeypatch):
    def say(gib: float) -> None:
        monkeypatch.setattr(kv_default, "get_free_cpu_memory", lambda: int(gib * GIB))

    return say


def arguments(model=NANO, **given):
    return SimpleNamespace(
        **{
            "model_path": str(model), "max_total_tokens": None, "mem_fraction_static": None, "dtype": "auto",
            "dp_size": 1, "context_length": None, "max_running_requests": None, "page_size": None,
            "swa_full_tokens_ratio": 0.8, "speculative_algorithm": "EAGLE", **given,
        }
    )  # fmt: skip


def cell(mtp: bool = True, width: int = 1) -> float:
    return width * (FULL + 0.8 * (SLIDING + MTP * mtp))


def test_most_of_what_is_free_and_never_all(free):
    for gib in (8, 16, 32):
        free(gib)
        taken = max_total_tokens(arguments()) * cell()
        assert (gib * GIB - SERVER - RESERVE) * 0.95 < taken < gib * GIB - SERVER - 3 * GIB


def test_at_most_the_largest_batch_of_full_contexts(free):
    free(64)
    tokens = max_total_tokens(arguments(context_length=4096, max_running_requests=4))
    assert 4 * 4096 <= tokens <= 4 * 4096 + 4 * 8
    longer = max_total_tokens(arguments(context_length=10**7, max_running_requests=1))
    assert longer <= 262_144 + 8  # the model's own limit


def test_width_of_an_element_and_replicas(free):
    free(12)
    half, mtp_off = max_total_tokens(arguments()), max_total_tokens(arguments(speculative_algorithm=None))
    assert mtp_off / half == pytest.approx(cell() / cell(mtp=False), rel=0.01)
    assert max_total_tokens(arguments(dtype="float32")) == pytest.approx(half / 2, rel=0.01)
    free(24)
    assert max_total_tokens(arguments(dp_size=2)) == pytest.approx(half, rel=0.01)


@pytest.mark.parametrize("given", [{"max_total_tokens": 5}, {"mem_fraction_static": 0.5}])
def test_the_users_own_flag_decides(free, given):
    free(16)
    assert max_total_tokens(arguments(**given)) is None


def test_mapped_weights_count_as_used(free, tmp_path):
    """Q8_0 of nano takes 3.9 MiB of the file, whatever the kernel calls them."""
    write_gguf(NANO, tmp_path / "nano.gguf")
    free(6)
    left = max_total_tokens(arguments(NANO)) - max_total_tokens(arguments(tmp_path / "nano.gguf"))
    bf16, q8_0 = 6.5 * MIB, 6.5 * MIB * 34 / 64
    assert left * cell() == pytest.approx(q8_0 - bf16, rel=0.05)


def test_weights_without_room_name_the_flag(free):
    free(2)
    with pytest.raises(ValueError, match=r"GiB of weights leave no room for KV in the 2.0 GiB .*--max-total-tokens"):
        max_total_tokens(arguments())


def test_what_is_not_ours_is_sglangs(free, tmp_path):
    free(16)
    assert max_total_tokens(arguments("some/model-of-a-hub")) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert max_total_tokens(arguments(tmp_path)) is None
    full_only = make_checkpoint(tmp_path / "full", CheckpointShape(num_layers=1, num_mtp=0))
    assert max_total_tokens(arguments(full_only)) is None
