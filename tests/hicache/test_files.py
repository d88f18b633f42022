"""Pages in files: what was written comes back; what is damaged, cut, renamed or another server's does not."""

import logging
import os
import stat

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

from sglang_step35.hicache import files, identity
from sglang_step35.hicache.files import SEAL_BYTES, SealedFiles

PAGE = torch.arange(60, dtype=torch.float32).bfloat16()


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_updates", 0)  # other tests of this process load weights anew

    def make(identity: str = "a" * 32, rank: int = 0, **extra) -> SealedFiles:
        monkeypatch.setattr(files, "server_identity", lambda: identity)
        return SealedFiles(
            HiCacheStorageConfig(
                tp_rank=rank, tp_size=2, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
                enable_storage_metrics=False, is_page_first_layout=False, model_name="org/model",
                extra_config={"file_storage_path": str(tmp_path / "kv"), **extra},
            )
        )  # fmt: skip

    return make


def read(store: SealedFiles, key: str = "k", dtype=torch.bfloat16):
    return store.get(key, torch.zeros(60, dtype=dtype))


def only_file(store: SealedFiles):
    (entry,) = os.scandir(store.file_path)
    return entry.path


def test_a_page_comes_back_from_another_process_of_the_same_kind(store):
    assert store().set("k", PAGE)
    again = store()
    assert again.exists("k") and torch.equal(read(again), PAGE)
    assert os.path.getsize(only_file(again)) == SEAL_BYTES + 120


def test_another_identity_rank_or_key_finds_nothing(store, caplog):
    store().set("k", PAGE)
    with caplog.at_level(logging.WARNING):
        other = store("b" * 32)
    assert "1 KV files" in caplog.text and "passed over" in caplog.text
    for one, key in [(other, "k"), (store(rank=1), "k"), (store(), "l")]:
        assert not one.exists(key) and read(one, key) is None


def cut(path, size):
    os.truncate(path, os.path.getsize(path) - size)


def flip(path, offset):
    with open(path, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: cut(path, 1),
        lambda path: cut(path, 120),
        lambda path: os.truncate(path, 0),
        lambda path: flip(path, 0),
        lambda path: flip(path, 20),
        lambda path: flip(path, SEAL_BYTES),
        lambda path: flip(path, SEAL_BYTES + 119),
    ],
)
def test_a_damaged_file_is_removed_and_written_again(store, caplog, damage):
    one = store()
    for key in "kl":
        one.set(key, PAGE)
    for entry in list(os.scandir(one.file_path)):
        damage(entry.path)
    with caplog.at_level(logging.WARNING):
        target = torch.full((60,), 7.0).bfloat16()
        assert one.get("k", target) is None and read(one, "l") is None
    assert (target == 7).all()
    assert caplog.text.count("is damaged") == 1
    assert not os.listdir(one.file_path) and not one.exists("k")
    assert one.set("k", PAGE) and torch.equal(read(one), PAGE)


def test_a_file_under_another_name_is_damaged(store):
    one = store()
    one.set("k", PAGE)
    path = only_file(one)
    os.rename(path, path.replace("k_", "l_"))
    assert one.exists("l") and read(one, "l") is None


def test_numbers_of_another_type_are_damaged(store):
    store().set("k", PAGE)
    assert read(store(), dtype=torch.float16) is None


def test_removed_files_are_no_longer_counted(store):
    """Against SGLang's limit of the folder's size."""
    one = store(max_size=str(SEAL_BYTES + 150))
    one.set("k", PAGE)
    flip(only_file(one), 50)
    assert read(one) is None
    assert one.set("l", PAGE) and torch.equal(read(one, "l"), PAGE)


def test_updated_weights_are_another_checkpoint(store):
    one = store()
    one.set("k", PAGE)
    assert one.batch_exists_v2(["k"]).kv_hit_pages == 1
    identity.note_weight_update()
    assert not one.exists("k") and one.batch_exists_v2(["k"]).kv_hit_pages == 0 and read(one) is None
    assert not one.set("l", PAGE) and len(os.listdir(one.file_path)) == 1


def test_the_folder_is_its_owners(store, tmp_path, monkeypatch):
    (tmp_path / "kv").mkdir(0o777)
    assert stat.S_IMODE(os.stat(store().file_path).st_mode) == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="belongs to another user.*file_storage_path"):
        store()
