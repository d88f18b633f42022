"""Up to 64 rows of activations times bfloat16 weights, compiled by numba for this CPU: callbacks of `ggml_map_custom1`.

Weights are read as several streams that share no page of memory: neighbouring rows, as the wheel's own kernel reads
them, come at 11 GB/s on a core that reads 25 to 30 (Zen 4, rows of 2 KB), where prefetching seems to fall behind. What
several rows of activations need next is fetched by instructions while the tiles of `row_tiles.py` multiply.

Activations are float32, and so are products and sums of up to EXACT_ROWS of them. More of one matrix are rounded to
bfloat16 where the CPU multiplies pairs of such numbers, as torch's product rounds them: 16 rows are multiplied at 150
to 197 GFLOP/s so, of 227 that a core can, in float32 at 105 of 115, and torch's does 97 to 118. Where all activations
are bfloat16 numbers already this loses nothing: they go that way from the second tile on.

Letters: K columns, N rows of a matrix, E matrices, T tokens, P rows of activations, W rows of weights read at once.
"""

from functools import cache

import numpy as np
from numba import carray, njit, types
from numba.extending import overload

from sglang_step35.compiled_numbers import EXACT, floats, gated, narrow, pointer
from sglang_step35.numba_cache import GRAPH_STEP, SHARED, callback, digest
from sglang_step35.packed import step_operands
from sglang_step35.packed.row_tiles import ROWS, add_products, group, weights_at_once
from sglang_step35.packed.step_operands import DATA, NB, NE, SRC, WORDS, begin, words
from sglang_step35.vector_code import lanes, multiplies_pairs

_SOURCES = "packed.row_kernels", "packed.row_tiles", *step_operands.SOURCES, *SHARED
EXACT_ROWS = 8
_SHORT = np.uint16 if multiplies_pairs() else np.float32  # how more rows are stored

_W, _LANES, _GROUP = weights_at_once(), lanes(), group()
_SPACE = 32  # columns between packed rows: whole pages apart they would share few lines of a cache
_ROOM = 4096  # sums of a block: they stay in the nearest cache
AT_ONCE = 2048  # columns of W rows that stay in the nearest cache while rows of activations pass by


@njit(**EXACT)
def pitch(columns):
    """Numbers from one packed row to the next."""
    return (columns + _GROUP - 1) // _GROUP * _GROUP + _SPACE


@njit(**EXACT)
def _is_short(address, count):
    """Whether these float32 numbers are all bfloat16 ones."""
    words, lower = carray(pointer(address), count, np.uint32), np.uint32(0)
    for k in range(count):
        lower |= words[k] & np.uint32(0xFFFF)
    return lower == 0


def pack(kind, x, columns, to):
    """x [K] at its address as `add_products` reads it."""
    raise NotImplementedError("for compiled code alone")


@overload(pack)
def _pack_as(kind, x, columns, to):
    def exact(kind, x, columns, to):
        x, to = floats(x, columns), floats(to, columns + _GROUP)
        whole = columns // _GROUP * _GROUP
        for first in range(0, whole, _GROUP):
            for i in range(_LANES):
                to[first + i] = x[first + 2 * i]
                to[first + _LANES + i] = x[first + 2 * i + 1]
        if whole < columns:
            for i in range(_GROUP):
                k = whole + 2 * (i % _LANES) + i // _LANES
                to[whole + i] = x[k] if k < columns else np.float32(0)

    def short(kind, x, columns, to):
        x, to = floats(x, columns), carray(pointer(to), columns + _GROUP, kind)
        for k in range(columns):
            to[k] = narrow(kind, x[k])
        for k in range(columns, (columns + _GROUP - 1) // _GROUP * _GROUP):
            to[k] = 0

    return exact if kind.dtype == types.float32 else short


@njit(**EXACT)
def find_rows(streams, first, step, steps, end, to):
    """to [W]: addresses of a step's rows of weights. streams [3, W]: where a matrix begins, its rows' stride, and
    how many blocks of steps lie before the stream."""
    for j in range(_W):
        to[j] = streams[0, j] + streams[1, j] * min(first + streams[2, j] * steps + step, end - 1)


@njit(**EXACT)
def _block(kind, streams, x, columns, count, first, steps, end, room):
    """room: sums [steps, P, W] of the rows of weights from `first` on, those of a stream in successive steps."""
    floats(room, steps * count * _W)[:] = 0
    places, later = streams[3], streams[4]
    at_once = columns if count <= ROWS else AT_ONCE
    in_time = count == 1 or (count == 2 and columns <= AT_ONCE)  # what is wanted next comes without being asked for
    find_rows(streams, first, 0, steps, end, later)
    for step in range(steps):
        places, later = later, places
        find_rows(streams, first, step + 1, steps, end, later)
        ahead = places if in_time else later
        to = room + step * count * _W * 4
        for k in range(0, columns, at_once):
            last = min(columns, k + at_once)
            add_products(kind, x, pitch(columns), count, k, last, places.ctypes.data, ahead.ctypes.data, 0, to)


@njit(**EXACT)
def store_sums(to, own, count, first, steps, end, room, limit):
    """A block's sums, or what a gated network makes of them, into rows at addresses to [P]; limit 0: none."""
    sums, between = floats(room, steps * count * _W), count * _W
    for p in range(count):
        for j in range(own):
            begin = first + j * steps
            row, at, rows = floats(to[p] + begin * 4, steps), p * _W + j, min(steps, end - begin)
            if own == _W:
                for i in range(rows):
                    row[i] = sums[at + i * between]
            else:
                for i in range(rows):
                    row[i] = gated(sums[at + i * between], sums[at + own + i * between], limit)


@njit(**EXACT)
def streams_of(out, number, own):
    """See `find_rows`; two rows more for its results. own: streams of the first matrix, then those of the second."""
    streams = np.empty((5, _W), np.int64)
    for j in range(_W):
        weights = words(out[SRC + 1 + j // own])
        streams[0, j], streams[1, j] = weights[DATA] + number * weights[NB + 2], weights[NB + 1]
        streams[2, j] = j % own
    return streams


@njit(**EXACT)
def steps_of_block(rows, own, count):
    """Steps of blocks of about equal size in which so many rows of weights are multiplied, `own` in a step."""
    needed = (rows + own - 1) // own
    blocks = max(1, (needed * count * _W + _ROOM - 1) // _ROOM)
    return (needed + blocks - 1) // blocks


@njit(**EXACT)
def _multiply(kind, out, number, places, count, part, parts, limit):
    """places [2, P]: addresses of the `count` rows that want this matrix, and of their results."""
    columns, size = words(out[SRC + 1])[NE], words(out[SRC + 1])[NE + 1]
    low, end = size * part // parts, size * (part + 1) // parts
    own = _W if out[SRC + 1] == out[SRC + 2] else _W // 2
    steps = steps_of_block(end - low, own, count)
    streams, sums = streams_of(out, number, own), np.empty(steps * count * _W, np.float32)
    packed = np.empty(count * pitch(columns), kind)
    for p in range(count):
        pack(kind, places[0, p], columns, packed[p * pitch(columns) :].ctypes.data)
    for first in range(low, end, max(1, steps * own)):
        _block(kind, streams, packed.ctypes.data, columns, count, first, steps, end, sums.ctypes.data)
        store_sums(places[1], own, count, first, steps, end, sums.ctypes.data, limit)


@njit(**EXACT)
def _matrix(out, number, places, count, part, parts, limit):
    """See `_multiply`."""
    short = count > EXACT_ROWS
    if not short and count > ROWS:
        short, columns = True, words(out[SRC + 1])[NE]
        for p in range(count):
            short = short and _is_short(places[0, p], columns)
    if short:
        _multiply(_SHORT, out, number, places, count, part, parts, limit)
    else:
        _multiply(np.float32, out, number, places, count, part, parts, limit)


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
            if low < high:
                _matrix(out, number, places[:, low:high], high - low, part, parts, limit)

    return multiply
