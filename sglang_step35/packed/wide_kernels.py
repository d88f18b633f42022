"""Interleaved weights as rows of bfloat16, compiled by numba: a callback of `ggml_map_custom1`."""

from functools import cache

import numpy as np
from numba import carray, literally, njit

from sglang_step35.compiled_numbers import EXACT, rounded_up
from sglang_step35.numba_cache import GRAPH_STEP, SHARED, callback, digest
from sglang_step35.packed import step_operands
from sglang_step35.packed.amx_tiles import LINE, SIDE, TILE, lay_interleaved, turn_words
from sglang_step35.packed.int8_formats import COLUMNS, FORMATS
from sglang_step35.packed.step_operands import DATA, NB, NE, SRC, WORDS, words

_PACKED = "wide_kernels", "amx_tiles", "int8_formats", "int8_code"
_SOURCES = *(f"packed.{name}" for name in _PACKED), *step_operands.SOURCES, *SHARED


@njit(**EXACT)
def _unpack(kind, groups, out, part, parts):
    """One thread's rows: those of SIDE at a time, the last ones perhaps twice."""
    literally(kind)
    weights, tiles = words(out[SRC + 1]), out[NE] // COLUMNS
    stride, line = weights[NB + 1], out[NB + 1]
    memory = np.empty(tiles * TILE + LINE, np.uint8)
    turned = rounded_up(memory.ctypes.data, LINE)
    sixteens = (out[NE + 1] + SIDE - 1) // SIDE
    for number in range(sixteens * part // parts, sixteens * (part + 1) // parts):
        row = min(SIDE * number, out[NE + 1] - SIDE)
        first = weights[DATA] + row * stride
        lay_interleaved(kind, first, first + SIDE // 2 * stride, stride, tiles // groups, turned)
        for tile in range(tiles):
            turn_words(turned + tile * TILE, out[DATA] + row * line + tile * LINE, line)
    memory[0] = 0  # kept until here


@cache
def unpacker(number: int):
    """`unpack` for weights of that type of the library: [K, N] to as many bfloat16 numbers."""
    sources, groups = digest(*_SOURCES), FORMATS[number].groups

    @callback(GRAPH_STEP)
    def unpack(address, _shape, part, parts, _data):
        """One thread's part."""
        size = WORDS if sources else 0  # for the key of the cache
        _unpack(number, groups, carray(address, size, np.int64), part, parts)

    return unpack
