"""Weights lie in pages of 2 MB where the kernel has them, and nothing else is touched."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sglang_step35 import huge_pages
from sglang_step35.packed import ik_check, prepare
from sglang_step35.packed.ggml import TYPES, GGMLTensor
from sglang_step35.packed.parameter import PackedParameter
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint

MEGABYTE = 1 << 20


def in_huge_pages(tensor: Tensor) -> int:
    """Bytes, of the mappings that the tensor lies in."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            first, last = (int(bound, 16) for bound in bounds.groups())
            inside = first < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < last
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.fixture
def advised(monkeypatch) -> list[range]:
    """The memory for which the system is asked."""
    asked: list[range] = []
    monkeypatch.setattr(huge_pages, "page_size", lambda: 2 * MEGABYTE)
    monkeypatch.setattr(huge_pages, "_advise", lambda start, end, _advice: asked.append(range(start, end)))
    return asked


@pytest.mark.skipif(not huge_pages.page_size(), reason="this system has no huge pages")
@pytest.mark.parametrize("written_before", (True, False))
def test_memory_lies_in_huge_pages(written_before):
    values = torch.arange(64 * MEGABYTE // 8)
    tensor = values.clone() if written_before else torch.empty_like(values)
    before = in_huge_pages(tensor)
    huge_pages.use(tensor)
    if not written_before:
        tensor.copy_(values)
    assert torch.equal(tensor, values)
    if not in_huge_pages(tensor):
        pytest.skip("the kernel has none to give")
    assert in_huge_pages(tensor) - before >= 48 * MEGABYTE


def test_all_of_a_tensor_is_asked_for(advised):
    tensor = torch.empty(9 * MEGABYTE, dtype=torch.uint8)
    huge_pages.use(tensor)
    for asked in advised:
        assert asked.start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= asked.stop
        assert tensor.data_ptr() - asked.start < 2 * MEGABYTE
    assert len(advised) == 2 and advised[0].start % 4096 == 0 and len(advised[1]) % (2 * MEGABYTE) == 0


def test_small_tensors_and_other_devices_are_left_alone(advised):
    huge_pages.use(torch.empty(2 * MEGABYTE - 1, dtype=torch.uint8))
    huge_pages.use(torch.empty(9 * MEGABYTE, device="meta"))
    assert advised == []


@pytest.mark.parametrize("copied", (True, False))
def test_mapped_files_are_left_alone(advised, monkeypatch, tmp_path, copied):
    if copied and not ik_check.usable():
        pytest.skip("the library is not usable here")
    monkeypatch.setattr(prepare, "_memory_allows", lambda _size: copied)
    rows, size = 2048, 34 * 64
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=rows * size, dtype=torch.uint8).zero_()
    parameter = PackedParameter.of(None, cut=lambda _part, tensor: tensor, prepares=True)
    parameter.fill(None, GGMLTensor(TYPES["Q8_0"], mapped.view(rows, size)))
    parameter.prepare()
    file = range(mapped.data_ptr(), mapped.data_ptr() + mapped.nbytes)
    assert bool(advised) == copied
    own = advised[::2]  # without the neighbours in a huge page
    assert all(asked.stop <= file.start or file.stop <= asked.start for asked in own)


@pytest.mark.parametrize("draft", (False, True))
def test_parameters_ask_before_they_are_loaded(monkeypatch, tmp_path, draft):
    asked: set[int] = set()
    monkeypatch.setattr(huge_pages, "use", lambda tensor: asked.add(id(tensor)))
    model = model_host.load(make_checkpoint(tmp_path, CheckpointShape()), draft=draft)
    assert {id(parameter) for parameter in model.parameters()} <= asked


def test_a_kernel_that_refuses_is_no_error(monkeypatch):
    monkeypatch.setattr(huge_pages, "_WHEN_WRITTEN", 999)
    monkeypatch.setattr(huge_pages, "_NOW", 999)
    tensor = torch.ones(9 * MEGABYTE, dtype=torch.uint8)
    huge_pages.use(tensor)
    assert tensor.all()


@pytest.mark.parametrize(
    ("platform", "enabled", "size"),
    (
        ("linux", "always [madvise] never", 1 << 21),
        ("linux", "always madvise [never]", 0),
        ("linux", None, 0),
        ("x", "", 0),
    ),
)
def test_systems_without_them(monkeypatch, tmp_path, platform, enabled, size):
    if enabled is not None:
        (tmp_path / "enabled").write_text(enabled)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages.sys, "platform", platform)
    huge_pages.page_size.cache_clear()
    try:
        assert huge_pages.page_size() == size
    finally:
        huge_pages.page_size.cache_clear()
