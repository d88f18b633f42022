"""Products of many rows as steps of ggml's graphs, where the CPU has AMX: interleaved, bfloat16 and FP8 weights.

Against the kernels that take fewer rows (Emerald Rapids, one thread): bfloat16 2.3 times as fast from 16 rows, 4 from
32, experts of 64 rows each 4; FP8 2.5, 4 and 4; Q4_0, Q8_0 and K-quants 1.2 to 1.8 from 32 rows, 2 from 64, experts of
64 rows each 1.1 to 1.6. With fewer rows unpacking the weights costs more than the unit saves.

Shapes are given as ggml counts them, the innermost dimension first. Letters: K columns, N rows of a matrix.
"""

from functools import cache

from sglang_step35.packed import int8_rows
from sglang_step35.packed.ggml import TYPES
from sglang_step35.packed.ik_library import Library
from sglang_step35.packed.ik_weights import FLOAT8

# By the library's number of the type, from how many rows of activations on. Up to 8 are multiplied in float32 by
# bfloat16 and FP8 weights.
FEWEST = {TYPES["BF16"].number: 9, FLOAT8: 9} | dict.fromkeys(int8_rows.KINDS, 24)
COLUMNS, AT_ONCE = 32, 8  # of a tile of weights; rows of weights that come from one place


@cache
def supported() -> bool:
    """Whether this CPU has the unit and the system lets us use it."""
    from sglang_step35.packed import amx_tiles  # importing numba takes a second: only where it is needed

    return amx_tiles.supported()


def takes(rows: float, *weights) -> bool:
    """Whether so many rows of activations are multiplied here by these matrices [K, N], or each of these stacks."""
    kinds = {weight.contents.type for weight in weights}
    if len(kinds) > 1 or rows < FEWEST.get(*kinds, rows + 1):
        return False
    fits = all(weight.contents.ne[0] % COLUMNS == 0 == weight.contents.ne[1] % AT_ONCE for weight in weights)
    return fits and supported()


def step(library: Library, shape: tuple[int, ...], *sources, limit: float | None = None):
    """A float32 result of this shape by `amx_kernels.multiplier`, which says what the operands are."""
    from sglang_step35.packed.amx_kernels import multiplier

    return library.callback(multiplier(sources[0].contents.type), None, shape, *sources, limit=limit)
