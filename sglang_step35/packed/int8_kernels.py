"""Activations as int8 times interleaved weights, compiled by numba for this CPU: callbacks of `ggml_map_custom1`.

Letters: K columns, N rows of a matrix, E matrices, T tokens, P rows of activations.
"""

import ctypes
from functools import cache

import numpy as np
from numba import carray, literally, njit

from sglang_step35.compiled_numbers import EXACT, floats, pointer, silu
from sglang_step35.numba_cache import GRAPH_STEP, SHARED, callback, digest
from sglang_step35.packed.ik_library import CALLBACK_LIMIT, CTensor
from sglang_step35.packed.int8_formats import COLUMNS, FORMATS
from sglang_step35.packed.int8_tiles import LANES, MOST, RECORD, multiply_tile, quantise

_PACKED = "int8_kernels", "int8_tiles", "int8_formats", "int8_code", "ik_library"
_SOURCES = *(f"packed.{name}" for name in _PACKED), *SHARED
CALLBACK_OFFSET, CALLBACK_PARTS = 8, 9  # which op_params of `record` hold these of the format
ROWS_NEAR = 64  # rows of activations that pass by before the next ones, so that they stay in a core's own cache
# Where a tensor's fields begin, in words of 8 bytes; its parameters in words of 4.
_NE, _NB, _SRC, _DATA = (getattr(CTensor, name).offset // 8 for name in ("ne", "nb", "src", "data"))
_WORDS = ctypes.sizeof(CTensor) // 8
_PARAMETERS = CTensor.op_params.offset // 4
_LIMIT = _PARAMETERS + CALLBACK_LIMIT


@njit(**EXACT)
def _words(address):
    return carray(pointer(address), _WORDS, np.int64)


@njit(**EXACT)
def _integers(address, count):
    return carray(pointer(address), count, np.int32)


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
def _clear(results, size, low, high):
    """One thread's part of the results that want no matrix."""
    for address in results:
        floats(address, size)[low:high] = 0


@njit(**EXACT)
def _matrix(kind, columns, out, number, inputs, results, limit, part, parts):
    """One thread's rows of a matrix. inputs, results [P]: addresses of rows of records and of results. columns: of a
    block.
    """
    literally(kind)
    first, second, is_gated = _words(out[_SRC + 1]), _words(out[_SRC + 2]), out[_SRC + 1] != out[_SRC + 2]
    row, blocks, eights = first[_NB + 1], first[_NE] // columns, first[_NE + 1] // LANES
    low, high = eights * part // parts, eights * (part + 1) // parts
    apart = 0 if is_gated else (high - low + 1) // 2
    a, b = first[_DATA] + number * first[_NB + 2], second[_DATA] + number * second[_NB + 2]
    pairs = np.empty((MOST, 2, LANES), np.float32)
    to_pairs = np.array([pairs.ctypes.data + 8 * LANES * r for r in range(MOST)])
    for start in range(0, len(inputs), ROWS_NEAR):
        near = min(ROWS_NEAR, len(inputs) - start)
        tiles = (near + MOST - 1) // MOST
        for eight in range(low, high if is_gated else low + apart):
            other, left, right = eight + apart, 0, 4 * LANES
            if not is_gated:
                left, right = 4 * LANES * eight, 4 * LANES * other
            there = b + other * LANES * row if other < high else 0
            for tile in range(tiles):
                p, end = start + near * tile // tiles, start + near * (tile + 1) // tiles
                to = to_pairs.ctypes.data if is_gated else results.ctypes.data + 8 * p
                places = inputs.ctypes.data + 8 * p
                multiply_tile(kind, end - p, a + eight * LANES * row, there, row, blocks, places, to, left, right)
                if is_gated:
                    _gate(pairs, results, p, end, eight, limit)


@njit(**EXACT)
def _gate(pairs, results, start, end, eight, limit):
    """min(silu(gate), limit) * clamp(up, -limit, limit) of pairs [MOST, (gate, up), LANES]; limit 0: none."""
    for p in range(start, end):
        to, r = floats(results[p] + 4 * LANES * eight, LANES), p - start
        if limit > 0:
            for i in range(LANES):
                to[i] = min(silu(pairs[r, 0, i]), limit) * min(max(pairs[r, 1, i], -limit), limit)
        else:
            for i in range(LANES):
                to[i] = silu(pairs[r, 0, i]) * pairs[r, 1, i]


@cache
def quantiser():
    """`record`, whose address is one of ggml's callbacks."""
    sources = digest(*_SOURCES)

    @callback(GRAPH_STEP)
    def record(address, _shape, part, parts, _data):
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
            quantise(values, out[_DATA] + number * RECORD, offset, own)

    return record


@cache
def multiplier(number: int):
    """`multiply` for weights of that type of the library: also a callback."""
    sources = digest(*_SOURCES)
    columns = FORMATS[number].groups * COLUMNS

    @callback(GRAPH_STEP)
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
        _clear(places[1, : starts[1]], size, size * part // parts, size * (part + 1) // parts)
        for e in range(len(starts) - 2):
            low, high = starts[e + 1], starts[e + 2]
            if low < high:
                _matrix(number, columns, out, e, places[0, low:high], places[1, low:high], limit, part, parts)

    return multiply
