"""Rows and tokens of an MTP pass against the definition: layer i at row t reads token t + 1 + i."""

import torch

from sglang_step35.speculative.pass_input import extend_cache_locs, extend_rows, window_rows
from sglang_step35.speculative.rings import RequestRings

LAYERS = 3


def slots_table(rows, width):
    """req_to_token with slot 1000 * row + position, so that a slot names its position."""
    return 1000 * torch.arange(1, rows + 1)[:, None] + torch.arange(width)


def test_extend_rows_read_the_token_after_each_row():
    sequences = [list(range(100, 120)), list(range(200, 230))]
    rows = extend_rows(
        starts=[2, 0],
        ends=[6, 3],
        lines=[seq[s + 1 : e + LAYERS] for seq, s, e in zip(sequences, [2, 0], [6, 3])],
        num_layers=LAYERS,
        req_to_token=slots_table(2, 40),
        req_pool_indices=torch.tensor([1, 0]),
    )
    expected = [(0, t) for t in range(2, 6)] + [(1, t) for t in range(3)]
    assert rows.positions.tolist() == [t for _, t in expected]
    assert rows.slots.tolist() == [2002, 2003, 2004, 2005, 1000, 1001, 1002]
    assert rows.last.tolist() == [3, 6]
    for layer in range(LAYERS):
        tokens = rows.line[rows.base + layer].tolist()
        assert tokens == [sequences[b][t + 1 + layer] for b, t in expected]
    # Layer i's draft is the token at position end + 1 + i; the next layer's last row reads it.
    assert (rows.draft_at - 1).tolist() == (rows.base[rows.last]).tolist()


def test_window_rows_follow_the_accepted_length():
    rings = RequestRings(3, 16, 4, torch.float32, "cpu")
    pool_indices, seq_lens = torch.tensor([2, 0]), torch.tensor([9, 1])
    sequences = {2: list(range(100, 130)), 0: list(range(200, 230))}
    accept = torch.tensor([2, 4])
    for row, length, accepted in zip([2, 0], [9, 1], accept.tolist()):
        known = torch.arange(0, length + accepted + 1)
        rings.put_tokens(torch.full_like(known, row), known, torch.tensor(sequences[row])[known])
    width, verify = 6, 4
    start = seq_lens + verify - width
    rows = window_rows(
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens,
        accept_lens=accept,
        width=width,
        verify_width=verify,
        known=start[:, None] + torch.arange(width) >= torch.tensor([[8], [0]]),
        req_to_token=slots_table(3, 40),
        req_pool_indices=pool_indices,
        tokens=rings.token_window(pool_indices, start + 1, width + LAYERS),
    )
    positions = rows.positions.view(2, width).tolist()
    assert positions == [[7, 8, 9, 10, 11, 12], [0, 0, 1, 2, 3, 4]]
    slots = rows.slots.view(2, width).tolist()
    # Row 7 of the first request has no known hidden state, row -1 of the second does not exist.
    assert slots == [[0, 3008, 3009, 3010, 3011, 3012], [0, 1000, 1001, 1002, 1003, 1004]]
    assert rows.positions[rows.last].tolist() == [10, 4]
    assert rows.ends.tolist() == rows.ends_cpu.tolist() == [13, 5]
    for layer in range(LAYERS):
        tokens = rows.line[rows.base + layer].view(2, width)
        for b, row in enumerate([2, 0]):
            committed = (seq_lens[b] + accept[b]).item()
            for column, t in enumerate(range(start[b], start[b] + width)):
                if t >= 0 and t + 1 + layer <= committed:
                    assert tokens[b, column] == sequences[row][t + 1 + layer]
        rows.line[rows.draft_at + layer] = torch.tensor([1, 2]) + 10 * layer
        if layer + 1 < LAYERS:
            after = rows.line[rows.base[rows.last] + layer + 1].tolist()
            assert after == [1 + 10 * layer, 2 + 10 * layer]


def test_rings_keep_the_last_positions_and_know_their_request():
    rings = RequestRings(2, 4, 1, torch.float32, "cpu")
    rings.begin([1], ["a"], [3], [9])
    assert rings.known_before(1, "a", 9) == 4  # six rows known, four kept
    assert rings.known_before(1, "b", 9) == 0
    assert rings.known_before(1, "a", 8) == 0
    assert rings.known_before(1, "a", 12) == 0
    assert rings.known_before(1, "a", 12, decoding=True) == 4
    assert rings.first_after_prefill(1, 9, known=4) == 3
    assert rings.first_after_prefill(1, 5, known=0) == 5
    rings.begin([1], ["b"], [5], [6])
    assert rings.first_known[1] == 5 and rings.known_before(1, "b", 6) == 1
    where = torch.arange(5, 9)
    rings.put(torch.ones_like(where), where, where[:, None].float())
    assert rings.window(torch.tensor([1]), torch.tensor([6]), 3).flatten().tolist() == [6, 7, 8]


def test_cache_locs_are_the_window_after_the_committed_length():
    locs = extend_cache_locs(
        req_pool_indices=torch.tensor([1, 0]),
        req_to_token=slots_table(2, 20),
        start_offset=torch.tensor([4, 7]),
        end_offset=torch.tensor([6, 9]),
        batch_size=2,
        draft_token_num=2,
        device="cpu",
    )
    assert locs.tolist() == [2004, 2005, 1007, 1008]


def test_rows_of_rejected_drafts_are_left_out():
    """Requests at 5 and 9 that verified 4 tokens, of which 2 and 4 were committed; 2 rows before them come along."""
    rows = window_rows(
        seq_lens=torch.tensor([5, 9]),
        seq_lens_cpu=torch.tensor([5, 9]),
        accept_lens=torch.tensor([2, 4]),
        width=6,
        verify_width=4,
        known=torch.ones(2, 6, dtype=torch.bool),
        req_to_token=slots_table(2, 20),
        req_pool_indices=torch.tensor([0, 1]),
        tokens=torch.arange(18).view(2, 9),
    )
    fewer, kept = rows.committed()
    assert kept.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert fewer.positions.tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert fewer.slots.tolist() == rows.slots[kept].tolist() and fewer.base.tolist() == rows.base[kept].tolist()
    assert fewer.row_counts == [4, 6] and fewer.last.tolist() == [3, 9]
    assert fewer.ends.tolist() == fewer.ends_cpu.tolist() == [7, 13]
    assert fewer.line is rows.line and fewer.draft_at is rows.draft_at
