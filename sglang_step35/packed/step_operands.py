"""The tensors of a step, for callbacks of `ggml_map_custom1` that multiply rows by matrices, compiled by numba.

out [N, slots, T] is the step's result; its sources from 1 on: matrices [K, N, E] twice, or of a gated network gate and
up; x [.., slots or 1, T]; ids [slots, T] int32 where there are several matrices, -1 for none.
Letters: K columns, N rows of a matrix, E matrices, T tokens, P rows of activations.
"""

import ctypes

import numpy as np
from numba import carray, njit

from sglang_step35.compiled_numbers import EXACT, floats, pointer
from sglang_step35.packed.ik_library import CALLBACK_LIMIT, CTensor

# Where a tensor's fields begin, in words of 8 bytes; its parameters in words of 4.
NE, NB, SRC, DATA = (getattr(CTensor, name).offset // 8 for name in ("ne", "nb", "src", "data"))
WORDS = ctypes.sizeof(CTensor) // 8
PARAMETERS = CTensor.op_params.offset // 4
LIMIT = PARAMETERS + CALLBACK_LIMIT
ROWS_NEAR = 64  # rows of activations that pass by before the next ones, so that they stay in a core's own cache
SOURCES = "packed.step_operands", "packed.ik_library"


@njit(**EXACT)
def words(address):
    """A tensor's fields."""
    return carray(pointer(address), WORDS, np.int64)


@njit(**EXACT)
def places_of(out):
    """Rows in the order of the matrices that they want. starts [E + 2]: where those begin that want none, matrix 0 and
    so on, and their end. places [2, P]: addresses of the rows of x, and of their results.
    """
    x, ids, slots, count = words(out[SRC + 3]), out[SRC + 4], out[NE + 1], out[NE + 1] * out[NE + 2]
    starts, places = np.zeros(words(out[SRC + 1])[NE + 2] + 2, np.int64), np.empty((2, count), np.int64)
    wanted = np.zeros(count, np.int32)
    if ids:
        for p in range(count):
            row = words(ids)[DATA] + p // slots * words(ids)[NB + 1]
            wanted[p] = carray(pointer(row), slots, np.int32)[p % slots]
    for p in range(count):
        starts[wanted[p] + 2] += 1
    for e in range(1, len(starts)):
        starts[e] += starts[e - 1]
    free = starts.copy()
    for p in range(count):
        token, slot, place = p // slots, p % slots, free[wanted[p] + 1]
        free[wanted[p] + 1] += 1
        places[0, place] = x[DATA] + token * x[NB + 2] + slot % x[NE + 1] * x[NB + 1]
        places[1, place] = out[DATA] + token * out[NB + 2] + slot * out[NB + 1]
    return starts, places


@njit(**EXACT)
def clear(out, results, part, parts):
    """One thread's part of the results that want no matrix, at their addresses."""
    size = out[NE]
    for address in results:
        floats(address, size)[size * part // parts : size * (part + 1) // parts] = 0


@njit(**EXACT)
def begin(address, size, part, parts):
    """The fields of the result at a callback's address, its limit, and `places_of` them; one thread's part of what
    wants no matrix is cleared. size: WORDS."""
    out, limit = carray(address, size, np.int64), carray(address, 2 * WORDS, np.float32)[LIMIT]
    starts, places = places_of(out)
    clear(out, places[1, : starts[1]], part, parts)
    return out, limit, starts, places
