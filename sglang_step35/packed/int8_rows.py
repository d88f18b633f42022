"""Products with interleaved rows of weights as steps of ggml's graphs, where the CPU multiplies int8 by AVX-512 VNNI.

Two steps: the activations become records of int8, then every thread multiplies its rows of the weights by all of them.
Shapes are given as ggml counts them, the innermost dimension first. Letters: K columns, N rows of a matrix, T tokens.
"""

from ctypes import c_void_p, cast
from functools import cache

from sglang_step35.packed.ik_library import CALLBACK_LIMIT, F32, I8, Library, float_bits

EVERY_THREAD = -1  # GGML_N_TASKS_MAX
INTERLEAVED = 202, 208, 212, 213, 214  # Q4_0_R8, Q8_0_R8, Q4_K_R4, Q5_K_R4, Q6_K_R4
AT_ONCE = 8  # rows of weights


@cache
def supported() -> bool:
    """Whether this CPU has the instructions."""
    from sglang_step35.packed import int8_tiles  # importing numba takes a second: only where it is needed

    return int8_tiles.supported()


def takes(*weights) -> bool:
    """Whether these matrices [K, N], or stacks of them, are multiplied here: for any number of rows of activations."""
    kind = weights[0].contents.type
    if kind not in INTERLEAVED or any(weight.contents.type != kind for weight in weights):
        return False
    return all(weight.contents.ne[1] % AT_ONCE == 0 for weight in weights) and supported()


def step(library: Library, shape: tuple[int, ...], first, second, x, *ids, limit: float | None = None):
    """A float32 result of this shape by `int8_kernels.multiplier`, which says what the operands are."""
    from sglang_step35.packed.int8_kernels import multiplier

    kind = first.contents.type
    sources = first, second, _records(library, kind, x), *ids
    out = _custom(library, library.tensor(F32, *shape), multiplier(kind).address, *sources)
    out.contents.op_params[CALLBACK_LIMIT] = float_bits(limit or 0.0)
    return out


def _records(library: Library, kind: int, x):
    """The records that weights of this type are multiplied by; x: float32."""
    from sglang_step35.packed.int8_kernels import CALLBACK_OFFSET, CALLBACK_PARTS, quantiser
    from sglang_step35.packed.int8_formats import COLUMNS, FORMATS
    from sglang_step35.packed.int8_tiles import RECORD

    columns, *rows = x.contents.ne[:3]
    records = library.tensor(I8, columns // COLUMNS * RECORD, *rows)
    out = _custom(library, records, quantiser().address, x)
    out.contents.op_params[CALLBACK_OFFSET] = FORMATS[kind].offset
    out.contents.op_params[CALLBACK_PARTS] = FORMATS[kind].parts
    return out


def _custom(library: Library, like, address: int, *sources):
    """A step that our callback computes, which finds the sources behind the result."""
    out = library.ggml_map_custom1(library.arena, like, address, EVERY_THREAD, None)
    for place, source in enumerate(sources, start=1):
        out.contents.src[place] = cast(source, c_void_p)
    return out
