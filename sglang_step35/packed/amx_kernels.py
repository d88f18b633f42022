"""Many rows of activations times weights by AMX, compiled by numba: a callback of `ggml_map_custom1`.

Weights that the library interleaved, bfloat16 or FP8 ones. Activations and weights are rounded to bfloat16 and products
summed in float32: 0.25 % of a product, where activations in 8 bits make it 0.5 %. What a thread has of a matrix passes
by the activations in panels of SIDE rows, half of them from each of two places: of a gated network gate and up.

Tiles of interleaved weights come out as pairs, so that rows of activations are the other side; other weights are copied
row by row, and activations become pairs. Letters: K columns, N rows of a matrix, P rows of activations.
"""

from functools import cache

import numpy as np
from numba import carray, literally, njit
from numba.extending import overload

from sglang_step35.compiled_numbers import EXACT, floats, gated, pointer, rounded_up
from sglang_step35.numba_cache import GRAPH_STEP, SHARED, callback, digest
from sglang_step35.packed import step_operands
from sglang_step35.packed.amx_tiles import (
    LINE,
    SIDE,
    TILE,
    begin_tiles,
    end_tiles,
    fetch_to_write,
    lay_interleaved,
    lay_pairs,
    lay_row,
    multiply_tiles,
    split_sums,
    turn_words,
)
from sglang_step35.packed.ik_weights import FLOAT8
from sglang_step35.packed.int8_formats import COLUMNS, FORMATS
from sglang_step35.packed.row_tiles import narrow_row
from sglang_step35.packed.step_operands import DATA, NB, NE, PARAMETERS, SRC, WORDS, begin, words

_PACKED = "amx_kernels", "amx_tiles", "row_tiles", "int8_formats", "int8_code", "ik_weights"
_SOURCES = *(f"packed.{name}" for name in _PACKED), *step_operands.SOURCES, *SHARED
_HALF = SIDE // 2
_NEAR = 1 << 19  # bytes of activations that stay in a core's own cache while weights pass by
# Fields of `_matrices`.
PLACE, ROW, SCALES, SCALES_ROW, BLOCK_ROWS, FIRST_ROW, SHARED_COLUMNS, FIRST_COLUMN, SHARED_ROW = range(9)
FIELDS = 9


def lay_activations(kind, places, tiles, to):
    """Rows of float32 at addresses places [P], P in whole tiles: to [P / SIDE, tiles, TILE]."""
    raise NotImplementedError("for compiled code alone")


def lay_weights(kind, matrices, first, second, tiles, to, room):
    """A panel of _HALF rows from number `first` on of the first matrix, and from `second` on of the second one: to
    [tiles, TILE]. matrices: see `_matrices`. room: of a row in bfloat16.
    """
    raise NotImplementedError("for compiled code alone")


def multiply(kind, x, x_count, panels, panel_count, tiles, sums):
    """sums [x count, panel count, SIDE rows of activations, SIDE of weights], one or two of each.

    Behind four tiles of sums there is room for as many.
    """
    raise NotImplementedError("for compiled code alone")


@overload(lay_activations, prefer_literal=True)
def _lay_activations(kind, places, tiles, to):
    def rows(kind, places, tiles, to):
        for p in range(len(places)):
            lay_row(np.float32, places[p], tiles, to + p // SIDE * tiles * TILE + p % SIDE * LINE)

    def pairs(kind, places, tiles, to):
        for p in range(0, len(places), SIDE):
            lay_pairs(places[p:].ctypes.data, tiles, to + p // SIDE * tiles * TILE)

    return rows if kind.literal_value in FORMATS else pairs


@overload(lay_weights, prefer_literal=True)
def _lay_weights(kind, matrices, first, second, tiles, to, room):
    def interleaved(kind, matrices, first, second, tiles, to, room):
        row, blocks = matrices[0, ROW], tiles // groups
        lay_interleaved(kind, matrices[0, PLACE] + first * row, matrices[1, PLACE] + second * row, row, blocks, to)

    def ordinary(kind, matrices, first, second, tiles, to, room):
        for r in range(SIDE):
            matrix, row = matrices[r // _HALF], (first if r < _HALF else second) + r % _HALF
            lay_row(np.uint16, matrix[PLACE] + row * matrix[ROW], tiles, to + r * LINE)

    def float8(kind, matrices, first, second, tiles, to, room):
        for r in range(SIDE):
            matrix, row = matrices[r // _HALF], (first if r < _HALF else second) + r % _HALF
            block = (row + matrix[FIRST_ROW]) // matrix[BLOCK_ROWS]
            matrix[SHARED_ROW] = matrix[SCALES] + block * matrix[SCALES_ROW]
            narrow_row(matrix[PLACE] + row * matrix[ROW], tiles * COLUMNS, matrix[SHARED_COLUMNS:].ctypes.data, room)
            lay_row(np.uint16, room, tiles, to + r * LINE)

    if kind.literal_value in FORMATS:
        groups = FORMATS[kind.literal_value].groups
        return interleaved
    return float8 if kind.literal_value == FLOAT8 else ordinary


@overload(multiply, prefer_literal=True)
def _multiply(kind, x, x_count, panels, panel_count, tiles, sums):
    def rows(kind, x, x_count, panels, panel_count, tiles, sums):
        multiply_tiles(x, x_count, panels, panel_count, tiles, sums)

    def pairs(kind, x, x_count, panels, panel_count, tiles, sums):
        turned = sums + 4 * TILE
        multiply_tiles(panels, panel_count, x, x_count, tiles, turned)
        for i in range(x_count):
            for j in range(panel_count):
                turn_words(turned + (j * x_count + i) * TILE, sums + (i * panel_count + j) * TILE, LINE)

    return rows if kind.literal_value in FORMATS else pairs


@njit(**EXACT)
def _matrices(out, number):
    """[2, FIELDS] of matrix `number` of the step's two stacks: where it begins and its rows' stride.

    Of FP8 also these of its scales, the rows that share one, the place of the first row among these, and what
    `narrow_row` wants: the columns that share one, the place of the first among these and room for an address.
    """
    found = np.zeros((2, FIELDS), np.int64)
    for i in range(2):
        weights, parameters = words(out[SRC + 1 + i]), carray(pointer(out[SRC + 1 + i]), 2 * WORDS, np.int32)
        found[i, PLACE], found[i, ROW] = weights[DATA] + number * weights[NB + 2], weights[NB + 1]
        if weights[SRC]:
            scales = words(weights[SRC])
            found[i, SCALES], found[i, SCALES_ROW] = scales[DATA] + number * scales[NB + 2], scales[NB + 1]
            for j, field in enumerate((BLOCK_ROWS, SHARED_COLUMNS, FIRST_ROW, FIRST_COLUMN)):
                found[i, field] = parameters[PARAMETERS + j]
    return found


@njit(**EXACT)
def _matrix(kind, out, number, inputs, results, limit, part, parts):
    """One thread's rows of a matrix. inputs, results [P]: addresses of rows of float32."""
    literally(kind)
    matrices, is_gated = _matrices(out, number), out[SRC + 1] != out[SRC + 2]
    tiles, eights = words(out[SRC + 1])[NE] // COLUMNS, words(out[SRC + 1])[NE + 1] // _HALF
    low, high = eights * part // parts, eights * (part + 1) // parts
    apart = 0 if is_gated else (high - low + 1) // 2
    last = high if is_gated else low + apart
    at_once = max(2, _NEAR // (tiles * TILE)) * SIDE
    most = min(at_once, rounded_up(len(inputs), SIDE))
    places, x_memory = np.empty(most, np.int64), np.empty(most // SIDE * tiles * TILE + LINE, np.uint8)
    memory = np.empty((2 * tiles + 8) * TILE + (tiles + 1) * LINE, np.uint8)
    x, panels = rounded_up(x_memory.ctypes.data, LINE), rounded_up(memory.ctypes.data, LINE)
    sums, room = panels + 2 * tiles * TILE, panels + (2 * tiles + 8) * TILE
    for start in range(0, len(inputs), at_once):
        count = min(at_once, len(inputs) - start)
        whole = rounded_up(count, SIDE)
        for p in range(whole):
            places[p] = inputs[start + min(p, count - 1)]
        lay_activations(kind, places[:whole], tiles, x)
        for eight in range(low, last, 2):
            wide = min(2, last - eight)
            for j in range(wide):
                here, there = _HALF * (eight + j), _HALF * min(eight + j + apart, high - 1)
                lay_weights(kind, matrices, here, there, tiles, panels + j * tiles * TILE, room)
            for p in range(0, whole, 2 * SIDE):
                tall, rows = min(2, (whole - p) // SIDE), min(2 * SIDE, count - p)
                for r in range(rows):
                    _fetch(results[start + p + r], eight, eight + apart, is_gated)
                multiply(kind, x + p // SIDE * tiles * TILE, tall, panels, wide, tiles, sums)
                for r in range(rows):
                    at = sums + (r // SIDE * wide * SIDE + r % SIDE) * LINE
                    _store(at, wide, results[start + p + r], eight, eight + apart, high, is_gated, limit)
    memory[0] = x_memory[0]  # kept until here


@njit(**EXACT)
def _fetch(to, eight, other, is_gated):
    """Where `_store` will write."""
    fetch_to_write(to + 4 * _HALF * eight)
    if not is_gated:
        fetch_to_write(to + 4 * _HALF * other)


@njit(**EXACT)
def _store(sums, wide, to, eight, other, high, is_gated, limit):
    """A row's sums by one or two panels, or what a gated network makes of them."""
    if not is_gated:
        fits = min(wide, high - other)
        left, right = to + 4 * _HALF * eight, to + 4 * _HALF * other
        split_sums(sums, wide, left, right if fits == wide else 0)
        if 0 < fits < wide:
            split_sums(sums, fits, left, right)
        return
    pairs = np.empty((2, SIDE), np.float32)
    gate, up = pairs[0], pairs[1]
    split_sums(sums, wide, gate.ctypes.data, up.ctypes.data)
    hidden = floats(to + 4 * _HALF * eight, SIDE)
    for i in range(_HALF * wide):
        hidden[i] = gated(gate[i], up[i], limit)


@cache
def multiplier(number: int):
    """`multiply` for weights of that type of the library."""
    sources = digest(*_SOURCES)

    @callback(GRAPH_STEP)
    def multiply(address, _shape, part, parts, _data):
        """One thread's part: some rows of every matrix that is wanted. x: [K, slots or 1, T] float32."""
        size = WORDS if sources else 0  # for the key of the cache
        out, limit, starts, places = begin(address, size, part, parts)
        begin_tiles()
        for e in range(len(starts) - 2):
            low, high = starts[e + 1], starts[e + 2]
            if low < high:
                _matrix(number, out, e, places[0, low:high], places[1, low:high], limit, part, parts)
        end_tiles()

    return multiply
