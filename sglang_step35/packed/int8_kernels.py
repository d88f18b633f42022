"""Activations as int8 times interleaved rows of weights, compiled by numba for this CPU: callbacks of `ggml_map_custom1`.

Letters: K columns, N rows of a matrix, E matrices, T tokens, P rows of activations.
"""

import ctypes
from functools import cache

import numpy as np
from numba import carray, literally, njit, types

from sglang_step35.attention.portable.softmax_rows import EXACT, floats, powers
from sglang_step35.attention.portable.tiles import pointer
from sglang_step35.numba_cache import callback, digest
from sglang_step35.packed.ik_library import CALLBACK_LIMIT, CTensor
from sglang_step35.packed.int8_formats import COLUMNS, FORMATS
from sglang_step35.packed.int8_tiles import LANES, MOST, RECORD, SCALE, START, multiply_tile

_SOURCES = "int8_kernels", "int8_tiles", "int8_formats", "int8_code", "ik_library"
_SHARED = "attention.portable.softmax_rows", "attention.portable.tiles"
CALLBACK_OFFSET, CALLBACK_PARTS = 8, 9  # which op_params of `quantise` hold these of the format
ROWS_NEAR = 64  # rows of activations that pass by before the next ones, so that they stay in a core's own cache
_CALLBACK = types.void(types.voidptr, types.voidptr, types.intc, types.intc, types.voidptr)
# Where a tensor's fields begin, in words of 8 bytes; its parameters in words of 4.
_NE, _NB, _SRC, _DATA = (getattr(CTensor, name).offset // 8 for name in ("ne", "nb", "src", "data"))
_WORDS = ctypes.sizeof(CTensor) // 8
_PARAMETERS = CTensor.op_params.offset // 4
_LIMIT = _PARAMETERS + CALLBACK_LIMIT
_LOG2E = np.float32(1.4426950408889634)
_TO_INTEGER = np.float32(3 << 22)  # added to a small float32: its lowest bits are the nearest integer
_TO_INTEGER_BITS = np.int32(0x4B400000)


@njit(**EXACT)
def _words(address):
    return carray(pointer(address), _WORDS, np.int64)


@njit(**EXACT)
def _integers(address, count):
    return carray(pointer(address), count, np.int32)


@njit(**EXACT)
def _record(x, to, offset, parts):
    """32 columns of a row; see `int8_tiles.py`. A NaN among them makes the scale one."""
    values, bits, codes = floats(x, COLUMNS), _integers(x, COLUMNS), carray(pointer(to), COLUMNS, np.int8)
    largest = np.int32(0)
    for i in range(COLUMNS):
        largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))  # as integers: in the order of the numbers
    scale = np.int32(largest).view(np.float32) / np.float32(127)
    factor = np.float32(1) / scale if scale > 0 else np.float32(0)
    for i in range(COLUMNS):
        codes[i] = np.float32(values[i] * factor + _TO_INTEGER).view(np.int32) - _TO_INTEGER_BITS
    floats(to + SCALE, 1)[0] = scale
    share = COLUMNS // parts
    for part in range(parts):
        total = np.int32(0)
        for i in range(share):
            total += np.int32(codes[part * share + i])
        if offset:
            _integers(to + START, parts)[part] = -offset * total
        else:
            floats(to + START, parts)[part] = -scale * np.float32(total)


@njit(**EXACT)
def _places(out, starts, places):
    """Rows in the order of the matrices that they want. starts [E + 2]: where those begin that want none (-1), matrix 0
    and so on, and their end. places [2, P]: addresses of records, and of results.
    """
    x, ids, slots, count = _words(out[_SRC + 3]), out[_SRC + 4], out[_NE + 1], places.shape[1]
    wanted = np.zeros(count, np.int32)
    if ids:
        for p in range(count):
            wanted[p] = _integers(_words(ids)[_DATA] + p // slots * _words(ids)[_NB + 1], slots)[p % slots]
    for p in range(count):
        starts[wanted[p] + 2] += 1
    for e in range(1, len(starts)):
        starts[e] += starts[e - 1]
    free = starts.copy()
    for p in range(count):
        token, slot, place = p // slots, p % slots, free[wanted[p] + 1]
        free[wanted[p] + 1] += 1
        places[0, place] = x[_DATA] + token * x[_NB + 2] + slot % x[_NE + 1] * x[_NB + 1]
        places[1, place] = out[_DATA] + token * out[_NB + 2] + slot * out[_NB + 1]


@njit(**EXACT)
def _nothing(results, size, low, high):
    """What rows without a matrix have."""
    for address in results:
        floats(address, size)[low:high] = 0


@njit(**EXACT)
def _matrix(kind, columns, out, number, inputs, results, limit, part, parts):
    """One thread's rows of a matrix by these rows of activations. inputs, results [P]: addresses. columns: of a block."""
    literally(kind)
    first, second, is_gated = _words(out[_SRC + 1]), _words(out[_SRC + 2]), out[_SRC + 1] != out[_SRC + 2]
    row, blocks, eights = first[_NB + 1], first[_NE] // columns, first[_NE + 1] // LANES
    low, high = eights * part // parts, eights * (part + 1) // parts
    apart = 0 if is_gated else (high - low + 1) // 2
    sums = np.empty((MOST, 2 * LANES), np.float32)
    a, b = first[_DATA] + number * first[_NB + 2], second[_DATA] + number * second[_NB + 2]
    for start in range(0, len(inputs), ROWS_NEAR):
        near = min(ROWS_NEAR, len(inputs) - start)
        tiles = (near + MOST - 1) // MOST
        for eight in range(low, high if is_gated else low + apart):
            other = eight + apart
            there = b + other * LANES * row if other < high else 0
            for tile in range(tiles):
                p, end = start + near * tile // tiles, start + near * (tile + 1) // tiles
                places = inputs.ctypes.data + 8 * p
                multiply_tile(kind, end - p, a + eight * LANES * row, there, row, blocks, places, sums.ctypes.data)
                if is_gated:
                    _store_gated(sums, results[p:end], eight, limit)
                else:
                    _store(sums, results[p:end], eight, other if there else eight)


@njit(**EXACT)
def _store(sums, results, eight, other):
    """sums: rows of both places, or without gaps of one."""
    width = LANES if other == eight else 2 * LANES
    found = sums.reshape(-1)
    for r in range(len(results)):
        left, right = floats(results[r] + 4 * LANES * eight, LANES), floats(results[r] + 4 * LANES * other, LANES)
        for i in range(LANES):
            left[i] = found[r * width + i]
        if width > LANES:
            for i in range(LANES):
                right[i] = found[r * width + LANES + i]


@njit(**EXACT)
def _store_gated(sums, results, eight, limit):
    """min(silu(gate), limit) * clamp(up, -limit, limit); limit 0: none."""
    power = np.empty((MOST, LANES), np.float32)
    for r in range(MOST):  # all of them, whatever they hold: so the loops are vector code
        for i in range(LANES):
            power[r, i] = -abs(sums[r, i]) * _LOG2E
    powers(power.ctypes.data, MOST * LANES, np.float32(0))
    for r in range(len(results)):
        to = floats(results[r] + 4 * LANES * eight, LANES)
        for i in range(LANES):
            gate, up, small = sums[r, i], sums[r, LANES + i], power[r, i]
            gate *= (np.float32(1) if gate >= 0 else small) / (np.float32(1) + small)
            if limit > 0:
                gate, up = min(gate, limit), min(max(up, -limit), limit)
            to[i] = gate * up


@cache
def quantiser():
    """`quantise`, whose address is one of ggml's callbacks."""
    sources = digest(*(f"packed.{name}" for name in _SOURCES), *_SHARED)

    @callback(_CALLBACK)
    def quantise(address, _shape, part, parts, _data):
        """One thread's part: some records of out [bytes of a row's records, slots, T], from the tensor x [K, slots, T]
        that is its source 1.
        """
        out, parameters = carray(address, _WORDS, np.int64), carray(address, 2 * _WORDS, np.int32)
        offset, own = parameters[_PARAMETERS + CALLBACK_OFFSET], parameters[_PARAMETERS + CALLBACK_PARTS]
        x = _words(out[_SRC + 1])
        records = x[_NE] // COLUMNS if sources else 0  # for the key of the cache
        count = records * x[_NE + 1] * x[_NE + 2]
        for number in range(count * part // parts, count * (part + 1) // parts):
            row, record = number // records, number % records
            token, slot = row // x[_NE + 1], row % x[_NE + 1]
            values = x[_DATA] + token * x[_NB + 2] + slot * x[_NB + 1] + record * COLUMNS * 4
            _record(values, out[_DATA] + number * RECORD, offset, own)

    return quantise


@cache
def multiplier(number: int):
    """`multiply` for weights of that type of the library: also a callback."""
    sources = digest(*(f"packed.{name}" for name in _SOURCES), *_SHARED)
    columns = FORMATS[number].groups * COLUMNS

    @callback(_CALLBACK)
    def multiply(address, _shape, part, parts, _data):
        """One thread's part: some rows of every matrix that is wanted.

        out [N, slots, T] at `address`; its sources from 1 on: matrices [K, N, E] twice, or of a gated network gate and
        up; records [bytes, slots or 1, T]; ids [slots, T] int32 where there are several matrices, -1 for none.
        """
        out = carray(address, _WORDS, np.int64)
        limit = carray(address, 2 * _WORDS, np.float32)[_LIMIT]
        starts = np.zeros(_words(out[_SRC + 1])[_NE + 2] + 2, np.int64)
        places = np.empty((2, out[_NE + 1] * out[_NE + 2] if sources else 0), np.int64)
        _places(out, starts, places)
        size = out[_NE]
        _nothing(places[1, : starts[1]], size, size * part // parts, size * (part + 1) // parts)
        for e in range(len(starts) - 2):
            low, high = starts[e + 1], starts[e + 2]
            if low < high:
                _matrix(number, columns, out, e, places[0, low:high], places[1, low:high], limit, part, parts)

    return multiply
