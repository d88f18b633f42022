"""`segment`'s work on a block of keys where the CPU has AMX, compiled by numba: pools in bfloat16.

Queries and weights are rounded to bfloat16 and products summed in float32, as in torch's kernels. A block's keys become
tiles and its values pairs, and all rows pass by: scores, an online softmax, the weighted values, 2 * SIDE rows at once.
Letters: D head size, of which a tile takes COLUMNS; R rows, whole tiles of SIDE.
"""

import numpy as np
from numba import carray, njit

from sglang_step35.attention.portable.amx_code import add_products, hide, lay_values, weigh
from sglang_step35.attention.portable.softmax_rows import NEVER, fill, multiply
from sglang_step35.compiled_numbers import EXACT, floats, pointer
from sglang_step35.packed.amx_tiles import (
    LINE,
    SIDE,
    TILE,
    begin_tiles,
    end_tiles,
    lay_pairs,
    lay_row,
    multiply_tiles,
    turn_words,
)
from sglang_step35.packed.int8_formats import COLUMNS

STATE = 4 * LINE  # of a tile: largest scores and sums of weights (float32), the first key seen and the end (int32)


def room_bytes(rows: int, size: int, keys: int) -> int:
    """Of a thread, for so many rows (whole tiles) and blocks of so many keys.

    Queries in tiles of pairs, the block's keys and values; of two tiles of rows the scores, of one of them pairs of
    weights, of both the weights, and factors; every tile's state.
    """
    return 2 * size * (rows + 2 * keys) + 7 * keys // SIDE * TILE // 2 + 2 * LINE + rows // SIDE * STATE


@njit(**EXACT)
def begin(queries, rows, size, to):
    """Queries [R, D] float32 become tiles of pairs: to [R / SIDE, D / COLUMNS, TILE]."""
    begin_tiles()
    places = np.empty(SIDE, np.int64)
    for column in range(0, rows, SIDE):
        for r in range(SIDE):
            places[r] = queries + (column + r) * size * 4
        lay_pairs(places.ctypes.data, size // COLUMNS, to + column * size * 2)


@njit(**EXACT)
def begin_rows(states, rows, first, group, earlier_keys):
    """Nothing is seen so far. first: how many keys the first row sees; every `group` rows see one more."""
    for column in range(0, rows, SIDE):
        state = states + column // SIDE * STATE
        fill(state, SIDE, NEVER)
        fill(state + LINE, SIDE, np.float32(0))
        ends = carray(pointer(state + 2 * LINE), 2 * SIDE, np.int32)
        for r in range(SIDE):
            seen = first + (column + r) // group
            ends[r] = 0 if earlier_keys < 0 else max(0, seen - 1 - earlier_keys)
            ends[r + SIDE] = seen


@njit(**EXACT)
def add_block(room, states, rows, size, places, keys, key, scale, sums):
    """The block of keys at addresses places [keys], from the segment's number `key` on, and of the values behind them.

    room: as `begin` has left it. scale: of scores, for powers of 2. sums: [R, D] float32.
    """
    depth, tiles = size // COLUMNS, keys // SIDE
    own, values = room + rows * size * 2, room + (rows + keys) * size * 2
    scores = values + keys * size * 2
    words = scores + 2 * tiles * TILE
    weights = words + tiles // 2 * TILE
    factors = weights + tiles * TILE
    addresses = carray(pointer(places), keys, np.int64)
    for j in range(keys):
        lay_row(np.uint16, addresses[j], depth, own + j // SIDE * depth * TILE + j % SIDE * LINE)
    lay_values(places + keys * 8, keys, size, values)
    for column in range(0, rows // SIDE, 2):
        wide = min(2, rows // SIDE - column)
        for tile in range(0, tiles, 2):
            queries = room + column * depth * TILE
            multiply_tiles(own + tile * depth * TILE, 2, queries, wide, depth, scores + tile * wide * TILE)
        for i in range(wide):
            state, found = states + (column + i) * STATE, scores + i * TILE
            low, high = carray(pointer(state + 2 * LINE), 2 * SIDE, np.int32)[SIDE - 1 : SIDE + 1]
            if low > key or high < key + keys:
                hide(found, wide * TILE, tiles, key, state + 2 * LINE, state + 3 * LINE)
            weigh(found, wide * TILE, tiles, scale, state, factors, words)
            for tile in range(tiles // 2):
                turn_words(words + tile * TILE, weights + (i * tiles // 2 + tile) * TILE, LINE)
            _rescale(sums + (column + i) * SIDE * size * 4, size, factors)
        add_products(weights, wide, values, tiles // 2, size, sums + column * SIDE * size * 4)


@njit(**EXACT)
def _rescale(sums, size, factors):
    """A tile's rows [SIDE, D] by their factors."""
    own = floats(factors, SIDE)
    for r in range(SIDE):
        if own[r] != 1:
            multiply(sums + r * size * 4, size, own[r])


@njit(**EXACT)
def end(states, rows, scale, to):
    """States as `softmax_rows` keeps them: to [R, 2]."""
    end_tiles()
    for row in range(rows):
        state, found = floats(states + row // SIDE * STATE, 2 * SIDE), floats(to + row * 8, 2)
        found[0], found[1] = state[row % SIDE] * scale, state[row % SIDE + SIDE]
