"""Products as steps of ggml's graphs: the library's own, `int8_rows.py` for weights that it interleaved where the CPU
multiplies int8, `float8_kernels.py` for FP8, `row_kernels.py` for up to 64 rows and bfloat16 weights, or
`amx_rows.py` for many rows where the CPU has AMX.

`row_kernels.py` rounds activations to bfloat16 where more than 8 rows share a matrix, as torch's product does.

Shapes are given as ggml counts them, the innermost dimension first. Letters: K columns, N rows of a matrix, E experts,
k chosen experts of a token, T tokens.
"""

from collections.abc import Callable

from sglang_step35.packed import amx_rows, int8_rows
from sglang_step35.packed.ggml import TYPES
from sglang_step35.packed.ik_library import SILU, Library, float_bits
from sglang_step35.packed.ik_weights import FLOAT8

ROWS = 64  # of a matrix, at most, of each expert on average: torch's bfloat16 product pays for more
LARGE = 1 << 17  # weights of a matrix, at least: smaller ones stay in a cache, where the library loses little
_BF16 = TYPES["BF16"].number
# Bytes of an activation that the library narrows for 16-bit weights: `ggml_moe_up_gate` plans no memory for that.
HALF = 2


def units() -> list[str]:
    """What this CPU has that kernels of ours use, by Intel's names."""
    found = (("AVX-512 VNNI", int8_rows.supported()), ("AMX", amx_rows.supported()))
    return [name for name, there in found if there]


def product(library: Library, weight, x):
    """weight [K, N] times x [K, T] -> [N, T]."""
    step = _ours(x.contents.ne[1], weight)
    if step is None:
        return library.ggml_mul_mat(library.arena, weight, x)
    return step(library, (weight.contents.ne[1], x.contents.ne[1]), weight, weight, x)


def expert_product(library: Library, weight, x, ids):
    """weight [K, N, E] of each token's experts ids [k, T] times x [K, k, T] -> [N, k, T]; zeros where an id is -1."""
    step = _ours(_rows_of_each(ids, weight), weight)
    if step is None:
        return library.ggml_mul_mat_id(library.arena, weight, x, ids)
    return step(library, (weight.contents.ne[1], *ids.contents.ne[:2]), weight, weight, x, ids)


def gated(library: Library, gate, up, x, limit: float | None):
    """min(silu(gate x), limit) * clamp(up x, -limit, limit); gate, up [K, N], x [K, T] -> [N, T]."""
    step = _ours(x.contents.ne[1], gate, up)
    if step is None:
        return _limited(library.ggml_fused_up_gate(library.arena, up, gate, x, SILU), limit)
    return step(library, (gate.contents.ne[1], x.contents.ne[1]), gate, up, x, limit=limit)


def expert_gated(library: Library, gate, up, x, ids, limit: float | None):
    """The same by each token's experts ids [k, T]; gate, up [K, N, E], x [K, 1, T] -> [N, k, T]."""
    step = _ours(_rows_of_each(ids, gate), gate, up)
    if step is None:
        library.unplanned = max(library.unplanned, HALF * x.contents.ne[0] * x.contents.ne[2])
        return _limited(library.ggml_moe_up_gate(library.arena, up, gate, x, ids, SILU), limit)
    return step(library, (gate.contents.ne[1], *ids.contents.ne[:2]), gate, up, x, ids, limit=limit)


def _rows_of_each(ids, weight) -> float:
    """Rows of activations that a matrix gets, on average, but one at least."""
    return max(1, ids.contents.ne[0] * ids.contents.ne[1] / weight.contents.ne[2])


def _ours(rows: float, *weights) -> Callable | None:
    """What makes the step by a kernel of ours; None where the library multiplies."""
    if amx_rows.takes(rows, *weights):
        return amx_rows.step
    if int8_rows.takes(*weights):
        return int8_rows.step
    shapes = [(weight.contents.type, *weight.contents.ne[:2]) for weight in weights]
    if any(kind == FLOAT8 for kind, _, _ in shapes):
        return _by_float8
    takes = rows <= ROWS and all(kind == _BF16 and width * height >= LARGE for kind, width, height in shapes)
    return _by_bfloat16 if takes else None


def _by_bfloat16(library: Library, shape: tuple[int, ...], *sources, limit: float | None = None):
    """A float32 result of this shape."""
    from sglang_step35.packed.row_kernels import compiled  # importing numba takes a second: only where it is needed

    return library.callback(compiled(), None, shape, *sources, limit=limit)


def _by_float8(library: Library, shape: tuple[int, ...], *sources, limit: float | None = None):
    """The same."""
    from sglang_step35.packed.float8_kernels import compiled

    return library.callback(compiled(), None, shape, *sources, limit=limit)


def _limited(step, limit: float | None):
    step.contents.op_params[1] = float_bits(limit or 0.0)
    return step
