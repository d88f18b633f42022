"""Two servers share pages only where checkpoint, dtypes, page size and MTP depth are the same."""

import os
import shutil

import pytest
from sglang.srt.runtime_context import get_context

from sglang_step35.assets import NANO
from sglang_step35.hicache.identity import server_identity

BASE = dict(page_size=16, speculative_algorithm="EAGLE", speculative_num_steps=3, kv_cache_dtype="auto", dtype="auto")


@pytest.fixture
def nano(tmp_path):
    folder = tmp_path / "nano"
    shutil.copytree(NANO, folder)  # keeps times
    return folder


def identity(folder, **changes):
    with get_context().override_server_args(**BASE | {"model_path": str(folder)} | changes):
        return server_identity()


def test_a_faithful_copy_is_the_same_checkpoint(nano):
    first = identity(nano)
    assert len(first) == 32 and first == identity(nano)
    assert first == identity(shutil.copytree(nano, nano.with_name("elsewhere")))


@pytest.mark.parametrize(
    "changes",
    [
        {"page_size": 1}, {"dtype": "float32"}, {"kv_cache_dtype": "fp8_e4m3"}, {"speculative_num_steps": 2},
        {"speculative_algorithm": None}, {"json_model_override_args": '{"rope_theta": 5}'},
    ],
    ids=str,
)  # fmt: skip
def test_another_setting_is_another_identity(nano, changes):
    assert identity(nano) != identity(nano, **changes)


def test_depth_is_of_no_matter_without_speculation(nano):
    off = {"speculative_algorithm": None}
    assert identity(nano, **off) == identity(nano, **off, speculative_num_steps=None)


def test_other_weights_of_the_same_size_are_another_checkpoint(nano):
    before = identity(nano)
    file = nano / "model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    for index in range(len(data) // 2, len(data), 1000):  # as after more training: nearly every tensor differs
        data[index] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(nano) != before


def test_one_changed_weight_is_told_by_its_time(nano):
    before = identity(nano)
    file = nano / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-5000, os.SEEK_END)
        stream.write(b"\0")
    os.utime(file, (1, 1))
    assert identity(nano) != before


def test_another_config_is_another_checkpoint(nano):
    before = identity(nano)
    config = nano / "config.json"
    config.write_text(config.read_text().replace("10000", "20000", 1))
    assert identity(nano) != before
