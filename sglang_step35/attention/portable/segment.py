"""Some blocks of the keys of one request and one head, for all its rows: by vectors, or by AMX where the CPU has it.

Compiled by numba. Letters: D head size, R rows that read the keys of one head, padded to a multiple of SIDE. `task` and
`request` are those of `paged_kernel`. Scores are so scaled that weights are powers of 2.
"""

import numpy as np
from numba import carray, njit
from numba.extending import overload

from sglang_step35.attention.portable import amx_block
from sglang_step35.attention.portable.amx_code import fetch
from sglang_step35.attention.portable.softmax_rows import NEVER, fill, weigh
from sglang_step35.attention.portable.tiles import KEYS_AT_ONCE, ROWS, mix, scores
from sglang_step35.compiled_numbers import EXACT, floats, pointer, rounded_up, widen
from sglang_step35.packed.amx_tiles import LINE, SIDE
from sglang_step35.packed.int8_formats import COLUMNS

KEYS = 64  # of a block: they and their values stay in the nearest cache, and loops are long enough to pay
_PLACES = 4 * KEYS * 8  # bytes: addresses of a block's keys and values, and of the next one's
_LOG2E = 1.4426950408889634


def room_bytes(rows: int, size: int) -> int:
    """Of a thread: addresses, queries [R, D] in float32, and weights [R, KEYS] or what AMX takes."""
    rows = -(-rows // SIDE) * SIDE
    return _PLACES + rows * size * 4 + max(rows * KEYS * 4, amx_block.room_bytes(rows, size, KEYS))


@njit(**EXACT)
def integers(address, count):
    return carray(pointer(address), count, np.int64)


@njit(**EXACT)
def _queries(outer, task, request, head, factor, to):
    """Queries [R, D] of a head times a factor; padding is 0."""
    count, rows = task.group * task.size, request.rows
    for row in range(rows):
        first = task.q + (request.first_row + row) * task.q_stride + head * count * task.q_width
        own, x = carray(pointer(first), count, outer), floats(to + row * count * 4, count)
        for d in range(count):
            x[d] = widen(own[d]) * factor
    filled = rows * task.group
    fill(to + filled * task.size * 4, (rounded_up(filled, SIDE) - filled) * task.size, np.float32(0))


@njit(**EXACT)
def _find(task, request, head, key, end, to):
    """Addresses of the next block's keys, and from to [KEYS] on of its values: how many, at most `end` - key.

    The last one is repeated up to KEYS.
    """
    count = max(0, min(KEYS, end - key))
    row = task.table + request.index * task.table_stride + (request.end - request.keys + key) * 4
    slots = carray(pointer(row), count, np.int32)
    places, shift = integers(to, 2 * KEYS), head * task.size * task.width
    for j in range(rounded_up(count, KEYS)):
        slot = np.int64(slots[min(j, count - 1)])
        if task.mapping != 0:
            slot = integers(task.mapping + slot * 8, 1)[0]
        places[j] = task.keys + shift + slot * task.keys_stride
        places[j + KEYS] = task.values + shift + slot * task.values_stride
    return count


@njit(**EXACT)
def _by_rows(stored, outer, task, request, part, head, first, end, sums, states):
    rows, size = request.rows * task.group, task.size
    padded = rounded_up(rows, ROWS)
    places = task.rooms + part * task.room
    x = places + _PLACES
    weights = x + rounded_up(rows, SIDE) * size * 4
    _queries(outer, task, request, head, np.float32(task.scale * _LOG2E), x)
    fill(sums, padded * size, np.float32(0))
    for row in range(rows):
        fill(states + row * 8, 1, NEVER)
        fill(states + row * 8 + 4, 1, np.float32(0))
    later, own = places, places + 2 * KEYS * 8
    count = _find(task, request, head, first, end, later)
    for key in range(first, end, KEYS):
        later, own = own, later
        following = _find(task, request, head, key + KEYS, end, later)
        ahead = 2 * KEYS if following == KEYS else 0
        scores(stored, x, padded, size, own, rounded_up(count, KEYS_AT_ONCE), weights, KEYS, later, ahead)
        for row in range(rows):
            seen = request.end - request.rows + row // task.group + 1 - (request.end - request.keys + key)
            low = 0 if task.earlier_keys < 0 else max(0, seen - 1 - task.earlier_keys)
            weigh(weights + row * KEYS * 4, KEYS, low, min(count, seen), sums + row * size * 4, size, states + row * 8)
        mix(stored, weights, KEYS, padded, size, own + KEYS * 8, count, sums)
        count = following


@njit(**EXACT)
def _by_tiles(outer, task, request, part, head, first, end, sums, states):
    """`_by_rows` by AMX."""
    rows, size = request.rows * task.group, task.size
    padded = rounded_up(rows, SIDE)
    places, scale = task.rooms + part * task.room, np.float32(task.scale * _LOG2E)
    x = places + _PLACES
    own_states = rounded_up(x + padded * size * 4, LINE)
    room = own_states + padded // SIDE * amx_block.STATE
    _queries(outer, task, request, head, np.float32(1), x)
    amx_block.begin(x, padded, size, room)
    amx_block.begin_rows(own_states, padded, request.keys - request.rows + 1, task.group, task.earlier_keys)
    fill(sums, padded * size, np.float32(0))
    later, own = places, places + 2 * KEYS * 8
    _find(task, request, head, first, end, later)
    for key in range(first, end, KEYS):
        later, own = own, later
        following = _find(task, request, head, key + KEYS, end, later)
        fetch(later, 2 * rounded_up(following, KEYS), size * 2)
        amx_block.add_block(room, own_states, padded, size, own, KEYS, key, scale, sums)
    amx_block.end(own_states, rows, scale, states)


def segment(tiled, stored, outer, task, request, part, head, first, end, sums, states):
    """Keys first .. end of a head into sums [R, D] and states [R, 2] float32, with the memory of the thread of a part.

    tiled: a literal number, whether by AMX. stored: how pools hold numbers. outer: how queries are held.
    """
    raise NotImplementedError("for compiled code alone")


@overload(segment, prefer_literal=True)
def _choose_segment(tiled, stored, outer, task, request, part, head, first, end, sums, states):
    def by_rows(tiled, stored, outer, task, request, part, head, first, end, sums, states):
        _by_rows(stored, outer, task, request, part, head, first, end, sums, states)

    def by_tiles(tiled, stored, outer, task, request, part, head, first, end, sums, states):
        if task.size % COLUMNS == 0:
            _by_tiles(outer, task, request, part, head, first, end, sums, states)
        else:
            _by_rows(stored, outer, task, request, part, head, first, end, sums, states)

    return by_tiles if tiled.literal_value else by_rows
