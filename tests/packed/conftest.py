"""What tests of kernels share."""

from types import SimpleNamespace

import pytest
import torch

from sglang_step35.packed import prepare


@pytest.fixture
def threads(rows):
    """1 to 3."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 + rows % 3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def roomy(monkeypatch):
    """The host has memory enough to interleave."""
    memory = SimpleNamespace(available=99 << 20, total=100 << 20)
    monkeypatch.setattr(prepare.psutil, "virtual_memory", lambda: memory)
