"""Products as steps of ggml's graphs: the library's own, `int8_rows.py` for weights that it interleaved where the CPU
multiplies int8, or `row_kernels.py` for few rows and bfloat16 weights.

Shapes are given as ggml counts them, the innermost dimension first. Letters: K columns, N rows of a matrix, E experts,
k chosen experts of a token, T tokens.
"""

from ctypes import c_void_p, cast

from sglang_step35.packed import int8_rows
from sglang_step35.packed.ggml import TYPES
from sglang_step35.packed.ik_library import CALLBACK_LIMIT, F32, SILU, Library, float_bits

ROWS = 8  # tokens, at most, that share a matrix
APART = 64  # tokens, at most, that choose few of many matrices each
AT_ONCE = 4  # of them that share what was read of the weights
NEAR = 1 << 13  # activations that stay in a core's nearest cache while weights pass by
LARGE = 1 << 17  # weights of a matrix, at least: smaller ones stay in a cache, where the library loses nothing
EVERY_THREAD = -1  # GGML_N_TASKS_MAX
_BF16 = TYPES["BF16"].number


def suits(rows: int, columns: int) -> bool:
    """Whether activations [rows, columns] and bfloat16 weights are multiplied faster here than by the library."""
    return rows <= ROWS and min(rows, AT_ONCE) * columns <= NEAR


def product(library: Library, weight, x):
    """weight [K, N] times x [K, T] -> [N, T]."""
    if int8_rows.takes(x.contents.ne[1], weight):
        return int8_rows.step(library, (weight.contents.ne[1], x.contents.ne[1]), weight, weight, x)
    if not _ours((weight,), x.contents.ne[1]):
        return library.ggml_mul_mat(library.arena, weight, x)
    return _step(library, (weight.contents.ne[1], x.contents.ne[1]), weight, weight, x)


def expert_product(library: Library, weight, x, ids):
    """weight [K, N, E] of each token's experts ids [k, T] times x [K, k, T] -> [N, k, T]; zeros where an id is -1."""
    if int8_rows.takes(_rows_each(weight, ids), weight):
        return int8_rows.step(library, (weight.contents.ne[1], *ids.contents.ne[:2]), weight, weight, x, ids)
    if not _ours((weight,), x.contents.ne[2], apart=True):
        return library.ggml_mul_mat_id(library.arena, weight, x, ids)
    return _step(library, (weight.contents.ne[1], *ids.contents.ne[:2]), weight, weight, x, ids)


def gated(library: Library, gate, up, x, limit: float | None):
    """min(silu(gate x), limit) * clamp(up x, -limit, limit); gate, up [K, N], x [K, T] -> [N, T]."""
    if int8_rows.takes(x.contents.ne[1], gate, up):
        return int8_rows.step(library, (gate.contents.ne[1], x.contents.ne[1]), gate, up, x, limit=limit)
    if _ours((gate, up), x.contents.ne[1]):
        return _step(library, (gate.contents.ne[1], x.contents.ne[1]), gate, up, x, limit=limit)
    return _limited(library.ggml_fused_up_gate(library.arena, up, gate, x, SILU), limit)


def expert_gated(library: Library, gate, up, x, ids, limit: float | None):
    """The same by each token's experts ids [k, T]; gate, up [K, N, E], x [K, 1, T] -> [N, k, T]."""
    if int8_rows.takes(_rows_each(gate, ids), gate, up):
        return int8_rows.step(library, (gate.contents.ne[1], *ids.contents.ne[:2]), gate, up, x, ids, limit=limit)
    if _ours((gate, up), x.contents.ne[2], apart=True):
        return _step(library, (gate.contents.ne[1], *ids.contents.ne[:2]), gate, up, x, ids, limit=limit)
    return _limited(library.ggml_moe_up_gate(library.arena, up, gate, x, ids, SILU), limit)


def _rows_each(weight, ids) -> int:
    """Rows of activations that a matrix gets, if each gets as many, but one at least."""
    return max(1, ids.contents.ne[0] * ids.contents.ne[1] // weight.contents.ne[2])


def _ours(weights: tuple, tokens: int, apart: bool = False) -> bool:
    """apart: few of the tokens share a matrix."""
    shapes = [(weight.contents.type, *weight.contents.ne[:2]) for weight in weights]
    columns = shapes[0][1]
    fits = tokens <= APART and suits(1, columns) if apart else suits(tokens, columns)
    return fits and all(kind == _BF16 and columns * rows >= LARGE for kind, columns, rows in shapes)


def _step(library: Library, shape: tuple[int, ...], *sources, limit: float | None = None):
    """A float32 result of this shape by our callback, which finds the sources behind it."""
    from sglang_step35.packed.row_kernels import compiled  # importing numba takes a second: only where it is needed

    out = library.ggml_map_custom1(library.arena, library.tensor(F32, *shape), compiled().address, EVERY_THREAD, None)
    for place, source in enumerate(sources, start=1):
        out.contents.src[place] = cast(source, c_void_p)
    out.contents.op_params[CALLBACK_LIMIT] = float_bits(limit or 0.0)
    return out


def _limited(step, limit: float | None):
    step.contents.op_params[1] = float_bits(limit or 0.0)
    return step
