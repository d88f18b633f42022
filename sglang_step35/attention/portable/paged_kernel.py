"""Attention of few rows per request, keys and values read where they lie in the pools, compiled by numba for this CPU.

Letters: B requests, T query rows of the pass, Q rows of a request, H query heads, N key/value heads, G = H / N, D head
size, S slots of the pool, R = Q * G rows that read the keys of one head, padded to a multiple of ROWS.

A block of keys of one request and one head is a unit of work. The units stand in a row, request by request and head by
head; every part of the work is an equal share of them, so that a single request keeps all threads busy. Where a share
begins or ends within a head its result is a partial softmax; whoever finishes last merges those. Everything between
reading and writing is float32.
"""

from ctypes import Structure, c_double, c_int64
from functools import cache

import numpy as np
from numba import carray, njit, types

from sglang_step35.attention.portable.softmax_rows import NEVER, fill, merge, weigh
from sglang_step35.attention.portable.tiles import KEYS_AT_ONCE, ROWS, add_one, mix, scores
from sglang_step35.compiled_numbers import EXACT, floats, narrow, pointer, widen
from sglang_step35.numba_cache import GRAPH_STEP, SHARED, callback, digest

_SOURCES = *(f"attention.portable.{name}" for name in ("paged_kernel", "softmax_rows", "tiles")), *SHARED
KEYS = 64  # of a block: they and their values stay in the nearest cache, and loops are long enough to pay
# Addresses of memory without gaps, but for rows of q and slots of keys and values, which stand `*_stride` bytes apart.
# q, out: [T, H, D]. keys, values: [S, N, D]. table: int32 slots of each request's positions, `table_stride` bytes from
# request to request. mapping: int64, to the slots of the sliding pool, or 0. requests: [count + 1] of REQUEST.
# records: float32 [parts, 2, record]. rooms: [parts, room] bytes, each for one thread's own. For `store` alone: `rows`
# new keys and values [T, N, D] float32, and the slots they belong to [T] int64.
_ADDRESSES = "q out keys values table mapping requests records rooms new_keys new_values new_slots"
_STRIDES = "q_stride keys_stride values_stride table_stride"
_NUMBERS = "heads group size width q_width earlier_keys count record room parts rows"
_COUNTERS = "started finished"


class Task(Structure):
    _fields_ = [
        *((name, c_int64) for name in f"{_ADDRESSES} {_STRIDES} {_NUMBERS} {_COUNTERS}".split()),
        ("scale", c_double),
    ]


# index: its row of `table`. first_block: its first among one head's blocks of all requests. Of the last
# entry only this is read: the number of all blocks.
REQUEST = np.dtype([(name, np.int64) for name in ("first_row", "rows", "end", "index", "keys", "first_block")])
TASK, _REQUEST_BYTES = np.dtype(Task), REQUEST.itemsize
_LOG2E = 1.4426950408889634
_STORED = {"float32": np.float32, "bfloat16": np.uint16}
_STARTED, _FINISHED = (getattr(Task, name).offset for name in _COUNTERS.split())


def record_floats(rows: int, size: int) -> int:
    """Of a partial result: sums [R, D] and states [R, 2]."""
    return -(-rows // ROWS) * ROWS * (size + 2)


def room_bytes(rows: int, size: int) -> int:
    """Of a thread: queries [R, D] and weights [R, KEYS] in float32, addresses [2, 2, KEYS]."""
    return -(-rows // ROWS) * ROWS * (size + KEYS) * 4 + 4 * KEYS * 8


@njit(**EXACT)
def _request(task, b):
    return carray(pointer(task.requests + b * _REQUEST_BYTES), 1, REQUEST)[0]


@njit(**EXACT)
def _integers(address, count):
    return carray(pointer(address), count, np.int64)


@njit(**EXACT)
def _padded(count, step):
    return (count + step - 1) // step * step


@njit(**EXACT)
def _record(task, part, which, rows):
    """Addresses of sums and states of a part's first head, or of another one."""
    sums = task.records + (2 * part + which) * task.record * 4
    return sums, sums + _padded(rows, ROWS) * task.size * 4


@njit(**EXACT)
def _start(task, part):
    """The part's first unit."""
    return _request(task, task.count).first_block * task.heads * part // task.parts


@njit(**EXACT)
def _locate(task, unit, b):
    """(request, head, block, blocks) of a unit, the request not before b."""
    while _request(task, b + 1).first_block * task.heads <= unit:
        b += 1
    before = _request(task, b).first_block
    blocks = _request(task, b + 1).first_block - before
    inside = unit - before * task.heads
    return b, inside // blocks, inside % blocks, blocks


@njit(**EXACT)
def _queries(outer, task, request, head, to):
    """Queries [R, D] of a head, so scaled that their scores are powers of 2; padding is 0."""
    factor, count, rows = np.float32(task.scale * _LOG2E), task.group * task.size, request.rows
    for row in range(rows):
        first = task.q + (request.first_row + row) * task.q_stride + head * count * task.q_width
        own, x = carray(pointer(first), count, outer), floats(to + row * count * 4, count)
        for d in range(count):
            x[d] = widen(own[d]) * factor
    filled = rows * task.group
    fill(to + filled * task.size * 4, (_padded(filled, ROWS) - filled) * task.size, np.float32(0))


@njit(**EXACT)
def _find(task, request, head, key, end, to):
    """Addresses of the next block's keys, and from to [KEYS] on of its values: how many, at most `end` - key.

    The last one is repeated up to a multiple of KEYS_AT_ONCE.
    """
    count = max(0, min(KEYS, end - key))
    row = task.table + request.index * task.table_stride + (request.end - request.keys + key) * 4
    slots = carray(pointer(row), count, np.int32)
    places, shift = _integers(to, 2 * KEYS), head * task.size * task.width
    for j in range(_padded(count, KEYS_AT_ONCE)):
        slot = np.int64(slots[min(j, count - 1)])
        if task.mapping != 0:
            slot = _integers(task.mapping + slot * 8, 1)[0]
        places[j] = task.keys + shift + slot * task.keys_stride
        places[j + KEYS] = task.values + shift + slot * task.values_stride
    return count


@njit(**EXACT)
def _segment(stored, outer, task, request, part, head, first, end, sums, states):
    """Keys first .. end of a head into sums and states."""
    rows, size = request.rows * task.group, task.size
    padded = _padded(rows, ROWS)
    x = task.rooms + part * task.room
    weights = x + padded * size * 4
    places = weights + padded * KEYS * 4
    _queries(outer, task, request, head, x)
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
        scores(stored, x, padded, size, own, _padded(count, KEYS_AT_ONCE), weights, KEYS, later, ahead)
        for row in range(rows):
            seen = request.end - request.rows + row // task.group + 1 - (request.end - request.keys + key)
            low = 0 if task.earlier_keys < 0 else max(0, seen - 1 - task.earlier_keys)
            weigh(weights + row * KEYS * 4, KEYS, low, min(count, seen), sums + row * size * 4, size, states + row * 8)
        mix(stored, weights, KEYS, padded, size, own + KEYS * 8, count, sums)
        count = following


@njit(**EXACT)
def _finish(outer, task, request, head, sums, states):
    """Results of a head; of rows that see nothing 0."""
    for row in range(request.rows * task.group):
        at = (request.first_row + row // task.group) * task.heads * task.group + head * task.group + row % task.group
        state, found = floats(states + row * 8, 2), floats(sums + row * task.size * 4, task.size)
        factor = np.float32(0) if state[0] == NEVER else np.float32(1) / state[1]
        out = carray(pointer(task.out + at * task.size * task.q_width), task.size, outer)
        for d in range(task.size):
            out[d] = narrow(outer, found[d] * factor)


@njit(**EXACT)
def _part(stored, outer, task, part):
    """A share of the units. A first head that is not whole stays in the part's record 0, a last one in record 1."""
    low, high = _start(task, part), _start(task, part + 1)
    unit, b = low, 0
    while unit < high:
        b, head, block, blocks = _locate(task, unit, b)
        request = _request(task, b)
        stop = min(blocks, block + high - unit)
        sums, states = _record(task, part, np.int64(unit > low), request.rows * task.group)
        _segment(stored, outer, task, request, part, head, block * KEYS, min(stop * KEYS, request.keys), sums, states)
        if stop - block == blocks:
            _finish(outer, task, request, head, sums, states)
        unit += stop - block


@njit(**EXACT)
def _merge_parts(outer, task):
    """Heads that began in one part and ended in a later one."""
    b, began, which = 0, 0, 0
    for part in range(1, task.parts):
        unit = _start(task, part)
        b, head, block, blocks = _locate(task, unit, b)
        if block == 0:
            continue
        before = _start(task, part - 1)
        if unit - block >= before:
            began, which = part - 1, np.int64(unit - block > before)
        request = _request(task, b)
        rows = request.rows * task.group
        sums, states = _record(task, began, which, rows)
        more, more_states = _record(task, part, 0, rows)
        for row in range(rows):
            shift = row * task.size * 4
            merge(sums + shift, states + row * 8, more + shift, more_states + row * 8, task.size)
        if unit - block + blocks <= _start(task, part + 1):
            _finish(outer, task, request, head, sums, states)


@njit(**EXACT)
def _run_part(stored, outer, task, part, finished):
    """finished: address of the task's counter; whoever ends the last part merges, and leaves it as it was."""
    _part(stored, outer, task, part)
    if add_one(finished) == task.parts - 1:
        _merge_parts(outer, task)
        _integers(finished, 1)[0] = 0


@cache
def compiled(kind: str):
    """`void attend(Task *)`, for all threads to call, where queries, pools and results are of this kind."""
    stored, sources = _STORED[kind], digest(*_SOURCES)

    @callback(types.void(types.voidptr))
    def attend(address):
        task = carray(address, 1, TASK)[0]
        place = carray(address, 1, np.int64).ctypes.data
        while sources:  # true; closed over for the key of the cache
            part = add_one(place + _STARTED)
            if part >= task.parts:
                return
            _run_part(stored, stored, task, part, place + _FINISHED)

    return attend


@cache
def compiled_step(kind: str):
    """`compiled` as a step of a graph, again and again with the same task: queries and results are float32."""
    stored, sources = _STORED[kind], digest(*_SOURCES)

    @callback(GRAPH_STEP)
    def attend_step(_result, _operand, thread, threads, address):
        task = carray(address, 1, TASK)[0]
        place = carray(address, 1, np.int64).ctypes.data
        for part in range(thread, task.parts if sources else 0, threads):
            _run_part(stored, np.float32, task, part, place + _FINISHED)

    return attend_step


@cache
def compiled_store(kind: str):
    """A step of a graph before it: a task's new keys and values into their slots."""
    stored, sources = _STORED[kind], digest(*_SOURCES)

    @callback(GRAPH_STEP)
    def store_step(_result, _operand, thread, threads, address):
        task = carray(address, 1, TASK)[0]
        count, slots = task.heads * task.size, _integers(task.new_slots, task.rows)
        for row in range(thread, task.rows if sources else 0, threads):
            keys = carray(pointer(task.keys + slots[row] * task.keys_stride), count, stored)
            values = carray(pointer(task.values + slots[row] * task.values_stride), count, stored)
            new_keys = floats(task.new_keys + row * count * 4, count)
            new_values = floats(task.new_values + row * count * 4, count)
            for i in range(count):
                keys[i] = narrow(stored, new_keys[i])
                values[i] = narrow(stored, new_values[i])

    return store_step
