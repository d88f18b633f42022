"""Attention of few rows per request, keys and values read where they lie in the pools, compiled by numba for this CPU.

Letters: B requests, T query rows of the pass, Q rows of a request, H query heads, N key/value heads, G = H / N, D head
size, S slots of the pool, R = Q * G rows that read the keys of one head, padded to a multiple of SIDE.

A block of keys of one request and one head is a unit of work. The units stand in a row, request by request and head by
head; every part of the work is an equal share of them, so that a single request keeps all threads busy. Where a share
begins or ends within a head its result is a partial softmax; whoever finishes last merges those. What is
between reading and writing is float32, but for the operands of AMX.
"""

from ctypes import Structure, c_double, c_int64
from functools import cache

import numpy as np
from numba import carray, literally, njit, types

from sglang_step35.attention.portable.segment import KEYS, integers, segment
from sglang_step35.attention.portable.softmax_rows import NEVER, merge
from sglang_step35.attention.portable.tiles import add_one
from sglang_step35.compiled_numbers import EXACT, floats, narrow, pointer, rounded_up
from sglang_step35.numba_cache import GRAPH_STEP, SHARED, callback, digest
from sglang_step35.packed.amx_tiles import SIDE

_MODULES = "paged_kernel", "segment", "softmax_rows", "tiles", "amx_block", "amx_code"
_PACKED = "amx_tiles", "int8_formats", "int8_code"
_SOURCES = *(f"attention.portable.{n}" for n in _MODULES), *(f"packed.{n}" for n in _PACKED), *SHARED
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
BY_AMX = "bfloat16 by AMX"
_STORED = {"float32": np.float32, "bfloat16": np.uint16, BY_AMX: np.uint16}
_STARTED, _FINISHED = (getattr(Task, name).offset for name in _COUNTERS.split())


def record_floats(rows: int, size: int) -> int:
    """Of a partial result: sums [R, D] and states [R, 2]."""
    return -(-rows // SIDE) * SIDE * (size + 2)


@njit(**EXACT)
def _request(task, b):
    return carray(pointer(task.requests + b * _REQUEST_BYTES), 1, REQUEST)[0]


@njit(**EXACT)
def _record(task, part, which, rows):
    """Addresses of sums and states of a part's first head, or of another one."""
    sums = task.records + (2 * part + which) * task.record * 4
    return sums, sums + rounded_up(rows, SIDE) * task.size * 4


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
def _part(tiled, stored, outer, task, part):
    """A share of the units. A first head that is not whole stays in the part's record 0, a last one in record 1."""
    literally(tiled)
    low, high = _start(task, part), _start(task, part + 1)
    unit, b = low, 0
    while unit < high:
        b, head, block, blocks = _locate(task, unit, b)
        request = _request(task, b)
        stop = min(blocks, block + high - unit)
        sums, states = _record(task, part, np.int64(unit > low), request.rows * task.group)
        first, end = block * KEYS, min(stop * KEYS, request.keys)
        segment(tiled, stored, outer, task, request, part, head, first, end, sums, states)
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
def _run_part(tiled, stored, outer, task, part, finished):
    """finished: address of the task's counter; whoever ends the last part merges, and leaves it as it was."""
    literally(tiled)
    _part(tiled, stored, outer, task, part)
    if add_one(finished) == task.parts - 1:
        _merge_parts(outer, task)
        integers(finished, 1)[0] = 0


@cache
def compiled(kind: str):
    """`void attend(Task *)`, for all threads to call, where queries, pools and results are of this kind: float32,
    bfloat16 or BY_AMX, which is bfloat16, too."""
    stored, sources, tiled = _STORED[kind], digest(*_SOURCES), int(kind == BY_AMX)

    @callback(types.void(types.voidptr))
    def attend(address):
        task = carray(address, 1, TASK)[0]
        place = carray(address, 1, np.int64).ctypes.data
        while sources:  # true; closed over for the key of the cache
            part = add_one(place + _STARTED)
            if part >= task.parts:
                return
            _run_part(tiled, stored, stored, task, part, place + _FINISHED)

    return attend


@cache
def compiled_step(kind: str):
    """`compiled` as a step of a graph, again and again with the same task: queries and results are float32."""
    stored, sources, tiled = _STORED[kind], digest(*_SOURCES), int(kind == BY_AMX)

    @callback(GRAPH_STEP)
    def attend_step(_result, _operand, thread, threads, address):
        task = carray(address, 1, TASK)[0]
        place = carray(address, 1, np.int64).ctypes.data
        for part in range(thread, task.parts if sources else 0, threads):
            _run_part(tiled, stored, np.float32, task, part, place + _FINISHED)

    return attend_step


@cache
def compiled_store(kind: str):
    """A step of a graph before it: a task's new keys and values into their slots."""
    stored, sources = _STORED[kind], digest(*_SOURCES)

    @callback(GRAPH_STEP)
    def store_step(_result, _operand, thread, threads, address):
        task = carray(address, 1, TASK)[0]
        count, slots = task.heads * task.size, integers(task.new_slots, task.rows)
        for row in range(thread, task.rows if sources else 0, threads):
            keys = carray(pointer(task.keys + slots[row] * task.keys_stride), count, stored)
            values = carray(pointer(task.values + slots[row] * task.values_stride), count, stored)
            new_keys = floats(task.new_keys + row * count * 4, count)
            new_values = floats(task.new_values + row * count * 4, count)
            for i in range(count):
                keys[i] = narrow(stored, new_keys[i])
                values[i] = narrow(stored, new_values[i])

    return store_step
