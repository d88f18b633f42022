"""Slots of requests on the portable platform."""

import torch

from sglang_step35.platform.slots import assign_req_to_token


def test_every_request_gets_its_own_slots():
    """As slice by slice; one request gets none, and SGLang's lengths are int32."""
    table = torch.zeros(5, 20, dtype=torch.int32)
    requests, firsts, ends = [3, 0, 4], [2, 7, 0], [6, 7, 3]
    slots = torch.arange(100, 107)
    expected = table.clone()
    for number, part in zip(range(3), slots.split([4, 0, 3]), strict=True):
        expected[requests[number], firsts[number] : ends[number]] = part.int()
    lengths = (torch.tensor(numbers, dtype=torch.int32) for numbers in (firsts, ends))
    assign_req_to_token(torch.tensor(requests), table, *lengths, slots, 3)
    assert torch.equal(table, expected)
