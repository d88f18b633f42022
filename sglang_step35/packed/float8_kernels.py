"""Rows of activations times FP8 weights in blocks that share a scale, read where their file has them: a callback of
`ggml_map_custom1`, compiled by numba for this CPU.

Weights become float32 in registers, are multiplied by their scales, which the rows of a tile need not share, and by
float32 activations, so that a product is as exact as plain torch's. Where more than EXACT_ROWS rows of activations
share a matrix and the CPU multiplies pairs of bfloat16 numbers, both are rounded to such, which takes half the time.
Letters: K columns, N rows of a matrix, P rows of activations, W rows of weights read at once.
"""

from functools import cache

import numpy as np
from numba import carray, njit

from sglang_step35.compiled_numbers import EXACT, floats, pointer
from sglang_step35.numba_cache import GRAPH_STEP, SHARED, callback, digest
from sglang_step35.packed import step_operands
from sglang_step35.packed.row_kernels import (
    AT_ONCE,
    EXACT_ROWS,
    find_rows,
    pack,
    pitch,
    steps_of_block,
    store_sums,
    streams_of,
)
from sglang_step35.packed.row_tiles import add_products, narrow_row, weights_at_once
from sglang_step35.packed.step_operands import DATA, NB, NE, PARAMETERS, ROWS_NEAR, SRC, WORDS, begin, words
from sglang_step35.vector_code import multiplies_pairs

_SOURCES = "packed.float8_kernels", "packed.row_kernels", "packed.row_tiles", *step_operands.SOURCES, *SHARED
_W = weights_at_once()
_ROUNDS = multiplies_pairs()


@njit(**EXACT)
def _scales_of(out, number, own):
    """[4, W]: where the scales of a stream's matrix begin, their rows' stride, how many rows share one, and the row of
    the matrix's first among these. own: streams of the first matrix."""
    found = np.empty((4, _W), np.int64)
    for j in range(_W):
        weights = out[SRC + 1 + j // own]
        scales, parameters = words(words(weights)[SRC]), carray(pointer(weights), 2 * WORDS, np.int32)
        found[0, j], found[1, j] = scales[DATA] + number * scales[NB + 2], scales[NB + 1]
        found[2, j], found[3, j] = parameters[PARAMETERS], parameters[PARAMETERS + 2]
    return found


@njit(**EXACT)
def _find_scales(scales, streams, first, step, steps, end, to):
    """to [W]: addresses of the scales of a step's rows of weights."""
    for j in range(_W):
        row = min(first + streams[2, j] * steps + step, end - 1) + scales[3, j]
        to[j] = scales[0, j] + row // scales[2, j] * scales[1, j]


@njit(**EXACT)
def _exact_block(streams, scales, shared, x, columns, count, first, steps, end, room):
    """room: sums [steps, P, W]. shared [2 + W]: columns that share a scale, those of them before the first one, and
    room for addresses. x: float32."""
    places, later = streams[3], streams[4]
    find_rows(streams, first, 0, steps, end, later)
    for step in range(steps):
        places, later = later, places
        find_rows(streams, first, step + 1, steps, end, later)
        _find_scales(scales, streams, first, step, steps, end, shared[2:])
        a, b, to = places.ctypes.data, later.ctypes.data, room + step * count * _W * 4
        add_products(np.uint8, x, pitch(columns), count, 0, columns, a, b, shared.ctypes.data, to)


@njit(**EXACT)
def _short_block(streams, scales, shared, x, columns, count, first, steps, end, room):
    """The same by x in bfloat16, each row of weights rounded to it once."""
    panel, places = np.empty((_W, columns), np.uint16), streams[3]
    rows = np.array([panel[j].ctypes.data for j in range(_W)])
    row_scales = shared.copy()
    for step in range(steps):
        find_rows(streams, first, step, steps, end, places)
        _find_scales(scales, streams, first, step, steps, end, shared[2:])
        for j in range(_W):
            row_scales[2] = shared[2 + j]
            narrow_row(places[j], columns, row_scales.ctypes.data, rows[j])
        to = room + step * count * _W * 4
        for k in range(0, columns, AT_ONCE):
            a, last = rows.ctypes.data, min(columns, k + AT_ONCE)
            add_products(np.uint16, x, pitch(columns), count, k, last, a, a, 0, to)
        panel[0, 0] = 0  # kept until here


@njit(**EXACT)
def _multiply(short, out, number, places, count, part, parts, limit):
    """places [2, P]: addresses of the `count` rows that want this matrix, and of their results. short: see above."""
    first_matrix, parameters = words(out[SRC + 1]), carray(pointer(out[SRC + 1]), 2 * WORDS, np.int32)
    columns, size = first_matrix[NE], first_matrix[NE + 1]
    low, end = size * part // parts, size * (part + 1) // parts
    own = _W if out[SRC + 1] == out[SRC + 2] else _W // 2
    steps = steps_of_block(end - low, own, count)
    streams, scales = streams_of(out, number, own), _scales_of(out, number, own)
    shared = np.zeros(2 + _W, np.int64)
    shared[0], shared[1] = parameters[PARAMETERS + 1], parameters[PARAMETERS + 3]
    width = 2 if short else 4
    sums, packed = np.empty(steps * count * _W, np.float32), np.empty(count * pitch(columns) * width, np.uint8)
    for p in range(count):
        to = packed[p * pitch(columns) * width :].ctypes.data
        if short:
            pack(np.uint16, places[0, p], columns, to)
        else:
            floats(to, columns)[:] = floats(places[0, p], columns)
    for first in range(low, end, max(1, steps * own)):
        x, room = packed.ctypes.data, sums.ctypes.data  # here, so that they are kept as long
        sums[:] = 0
        if short:
            _short_block(streams, scales, shared, x, columns, count, first, steps, end, room)
        else:
            _exact_block(streams, scales, shared, x, columns, count, first, steps, end, room)
        store_sums(places[1], own, count, first, steps, end, room, limit)


@cache
def compiled():
    """`multiply`, whose address is one of ggml's callbacks."""
    sources = digest(*_SOURCES)

    @callback(GRAPH_STEP)
    def multiply(address, _shape, part, parts, _data):
        """One thread's part: some rows of every matrix that is wanted. x: [K, slots or 1, T] float32."""
        size = WORDS if sources else 0  # for the key of the cache
        out, limit, starts, places = begin(address, size, part, parts)
        for number in range(len(starts) - 2):
            low, high = starts[number + 1], starts[number + 2]
            short = _ROUNDS and high - low > EXACT_ROWS
            for start in range(low, high, ROWS_NEAR):
                near = min(ROWS_NEAR, high - start)
                _multiply(short, out, number, places[:, start : start + near], near, part, parts, limit)

    return multiply
