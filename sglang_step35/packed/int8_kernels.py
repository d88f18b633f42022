"""Activations as int8 times interleaved weights, compiled by numba for this CPU: callbacks of `ggml_map_custom1`.

Letters: K columns, N rows of a matrix, E matrices, T tokens, P rows of activations.
"""

from functools import cache

import numpy as np
from numba import carray, literally, njit

from sglang_step35.compiled_numbers import EXACT, floats, gated
from sglang_step35.numba_cache import GRAPH_STEP, SHARED, callback, digest
from sglang_step35.packed import step_operands
from sglang_step35.packed.int8_formats import COLUMNS, FORMATS
from sglang_step35.packed.int8_tiles import LANES, MOST, RECORD, multiply_tile, quantise
from sglang_step35.packed.step_operands import DATA, NB, NE, PARAMETERS, ROWS_NEAR, SRC, WORDS, begin, words

_PACKED = "int8_kernels", "int8_tiles", "int8_formats", "int8_code"
_SOURCES = *(f"packed.{name}" for name in _PACKED), *step_operands.SOURCES, *SHARED
CALLBACK_OFFSET, CALLBACK_PARTS = 8, 9  # which op_params of `record` hold these of the format


@njit(**EXACT)
def _matrix(kind, columns, out, number, inputs, results, limit, part, parts):
    """One thread's rows of a matrix. inputs, results [P]: addresses of rows of records and of results. columns: of a
    block.
    """
    literally(kind)
    first, second, is_gated = words(out[SRC + 1]), words(out[SRC + 2]), out[SRC + 1] != out[SRC + 2]
    row, blocks, eights = first[NB + 1], first[NE] // columns, first[NE + 1] // LANES
    low, high = eights * part // parts, eights * (part + 1) // parts
    apart = 0 if is_gated else (high - low + 1) // 2
    a, b = first[DATA] + number * first[NB + 2], second[DATA] + number * second[NB + 2]
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
    """What a gated network makes of pairs [MOST, (gate, up), LANES]."""
    for p in range(start, end):
        to, r = floats(results[p] + 4 * LANES * eight, LANES), p - start
        for i in range(LANES):
            to[i] = gated(pairs[r, 0, i], pairs[r, 1, i], limit)


@cache
def quantiser():
    """`record`, whose address is one of ggml's callbacks."""
    sources = digest(*_SOURCES)

    @callback(GRAPH_STEP)
    def record(address, _shape, part, parts, _data):
        """One thread's part: some records of out [bytes of a row's records, slots, T], from the tensor x [K, slots, T]
        that is its source 1.
        """
        out, parameters = carray(address, WORDS, np.int64), carray(address, 2 * WORDS, np.int32)
        offset, own = parameters[PARAMETERS + CALLBACK_OFFSET], parameters[PARAMETERS + CALLBACK_PARTS]
        x = words(out[SRC + 1])
        records = x[NE] // COLUMNS if sources else 0  # for the key of the cache
        count = records * x[NE + 1] * x[NE + 2]
        for number in range(count * part // parts, count * (part + 1) // parts):
            row, record = number // records, number % records
            token, slot = row // x[NE + 1], row % x[NE + 1]
            values = x[DATA] + token * x[NB + 2] + slot * x[NB + 1] + record * COLUMNS * 4
            quantise(values, out[DATA] + number * RECORD, offset, own)

    return record


@cache
def multiplier(number: int):
    """`multiply` for weights of that type of the library: also a callback."""
    sources = digest(*_SOURCES)
    columns = FORMATS[number].groups * COLUMNS

    @callback(GRAPH_STEP)
    def multiply(address, _shape, part, parts, _data):
        """One thread's part: some rows of every matrix that is wanted. x: records [bytes, slots or 1, T]."""
        size = WORDS if sources else 0  # for the key of the cache
        out, limit, starts, places = begin(address, size, part, parts)
        for e in range(len(starts) - 2):
            low, high = starts[e + 1], starts[e + 2]
            if low < high:
                _matrix(number, columns, out, e, places[0, low:high], places[1, low:high], limit, part, parts)

    return multiply
