"""Products with interleaved rows of weights as steps of ggml's graphs, where the CPU multiplies int8 by AVX-512 VNNI.

Two steps: the activations become records of int8, then every thread multiplies its rows of the weights by all of them.
The wheel's kernels, compiled for AVX2, take 1.3 to 2.1 times as long for one row (Emerald Rapids; on Zen 4 1.0 to 1.1),
on Zen 4 1.0 to 1.6 times for two, 1.2 to 2.8 for four and 1.5 to 3.5 from eight on. One thread each time. Activations
are rounded as the library rounds them for Q8_0: 0.5 % of a product.

Shapes are given as ggml counts them, the innermost dimension first. Letters: K columns, N rows of a matrix, T tokens.
"""

from ctypes import addressof
from functools import cache

from sglang_step35.packed.ik_library import I8, Library
from sglang_step35.packed.two_bits import TWO_BITS

# By the library's numbers: Q4_0_R8, Q8_0_R8, Q4_K_R4, Q5_K_R4 and Q6_K_R4. Two bits are ours alone.
KINDS = 202, 208, 212, 213, 214, TWO_BITS
AT_ONCE = 8  # rows of weights


@cache
def supported() -> bool:
    """Whether this CPU has the instructions."""
    from llvmlite import binding  # a tenth of a second, and numba below a whole one: only where they are needed

    features = binding.get_host_cpu_features()
    return all(features.get(name) for name in ("avx512f", "avx512bw", "avx512vl", "avx512vnni"))


def takes(*weights) -> bool:
    """Whether activations are multiplied here by these matrices [K, N], or each of these stacks, however many rows."""
    kind, *others = {weight.contents.type for weight in weights}
    if others or kind not in KINDS:
        return False
    return all(weight.contents.ne[1] % AT_ONCE == 0 for weight in weights) and supported()


def step(library: Library, shape: tuple[int, ...], first, second, x, *ids, limit: float | None = None):
    """A float32 result of this shape by `int8_kernels.multiplier`, which says what the operands are."""
    from sglang_step35.packed.int8_kernels import multiplier

    kind = first.contents.type
    sources = first, second, _records(library, kind, x), *ids
    return library.callback(multiplier(kind), None, shape, *sources, limit=limit)


def _records(library: Library, kind: int, x):
    """The records of x (float32) that weights of this type are multiplied by: one step for all products of a graph."""
    from sglang_step35.packed.int8_formats import COLUMNS, FORMATS
    from sglang_step35.packed.int8_kernels import CALLBACK_OFFSET, CALLBACK_PARTS, quantiser
    from sglang_step35.packed.int8_tiles import RECORD

    columns, *rows = x.contents.ne[:3]
    offset, parts = FORMATS[kind].offset, FORMATS[kind].parts
    key = addressof(x.contents), offset, parts
    if key not in library.shared:
        shape = columns // COLUMNS * RECORD, *rows
        out = library.shared[key] = library.callback(quantiser(), None, shape, x, kind=I8)
        out.contents.op_params[CALLBACK_OFFSET], out.contents.op_params[CALLBACK_PARTS] = offset, parts
    return library.shared[key]
