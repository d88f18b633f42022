"""Two tensor-parallel ranks with clocks, random states and roundings of their own must go on with the same numbers."""

import pytest
import torch

from tests.support.sampling_ranks import rank_main
from tests.support.warm import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What either rank decided, by itself and together."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(rank_main, folder, str(folder / "store"))
    return [torch.load(folder / str(rank)) for rank in range(2)]


def test_ranks_draft_to_the_same_depth_whatever_their_clocks_say(ranks):
    (own, _), (other, _) = (rank["alone"] for rank in ranks)
    assert own != other  # these clocks do lead to different depths
    (first, _), (second, _) = (rank["together"] for rank in ranks)
    assert first == second == own


def test_ranks_sample_the_same_drafts_and_accept_the_same_tokens(ranks):
    (_, own), (_, other) = (rank["alone"] for rank in ranks)
    assert not torch.equal(own[0], other[0]) and not torch.equal(own[2], other[2])
    (_, first), (_, second) = (rank["together"] for rank in ranks)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
