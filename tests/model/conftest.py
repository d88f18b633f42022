"""What tests of graphed passes share; other modules have checkpoints of their own."""

import pytest
import torch

from sglang_step35.attention.portable import paged_call
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.reference import load_reference


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("graphed"), CheckpointShape(residual=0.1))


@pytest.fixture(scope="module")
def reference(directory):
    return load_reference(directory)


@pytest.fixture(params=[1, 2, 3])
def threads(request, monkeypatch):
    """So many of them share even small passes."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(paged_call, "ALONE", 1)
    yield
    torch.set_num_threads(before)
