"""Rows of activations by rows of bfloat16 weights, as LLVM vector code.

A tile of ROWS rows of activations and `weights_at_once()` of weights has its sums in registers, so that each vector
that is read serves several. Columns come in groups, as many as a vector of weights has.
"""

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sglang_step35.vector_code import INT64, Code, lanes

ROWS = 4


def weights_at_once() -> int:
    """Rows of weights that a tile reads side by side."""
    return lanes() // ROWS


def group() -> int:
    return 2 * lanes()


@intrinsic
def add_products(typing, kind, x, pitch, rows, first, end, places, later, sums):
    """sums [rows, W] += x [rows, pitch] times W rows of weights at addresses places [W], W = `weights_at_once()`.

    Of columns first .. end, where first is a multiple of `group()`. kind: of x. np.float32: a group's numbers 0, 2, ..
    lie before 1, 3, ..; np.uint16: bfloat16, in order. x is 0 from its last column up to a whole group. later [W]:
    addresses of weights that are wanted next.
    """

    def generate(context, builder, signature, arguments):
        _, x, pitch, rows, first, end, places, later, sums = arguments
        code, width, number = Code(builder), 4 if kind.dtype == types.float32 else 2, weights_at_once()
        tiles = builder.sdiv(builder.add(rows, INT64(ROWS - 1)), INT64(ROWS))
        whole = builder.mul(builder.sdiv(rows, INT64(ROWS)), INT64(ROWS))
        weights = [code.integer(code.shift(places, j, 8)) for j in range(number)]

        def tile(row, count: int):
            own = [code.shift(x, builder.mul(builder.add(row, INT64(r)), pitch), width) for r in range(count)]
            # All tiles together fetch what `later` says, each its share: a row for each of them or for several.
            share = builder.mul(builder.sdiv(row, INT64(ROWS)), INT64(number))
            ahead = [builder.sdiv(builder.add(share, INT64(j)), tiles) for j in range(number)]
            ahead = [code.integer(code.shift(later, j, 8)) for j in ahead]
            _tile(code, width, own, weights, ahead, first, end, code.shift(sums, row, 4 * number))

        with cgutils.for_range_slice(builder, INT64(0), whole, INT64(ROWS)) as (row, _):
            tile(row, ROWS)
        for count in range(1, ROWS):
            with builder.if_then(builder.icmp_signed("==", builder.sub(rows, whole), INT64(count))):
                tile(whole, count)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 8), generate


def _tile(code: Code, width: int, inputs: list, weights: list, ahead: list, first, end, out) -> None:
    builder, add = code.builder, _add_exact if width == 4 else _add_pairs
    sums = code.zeros(len(inputs) * len(weights))
    whole = builder.mul(builder.sdiv(end, INT64(group())), INT64(group()))
    with cgutils.for_range_slice(builder, first, whole, INT64(group())) as (k, _):
        for address in ahead:
            code.prefetch(code.shift(address, k, 2))
        vectors = [code.load_halves(code.shift(address, k, 2), group()) for address in weights]
        add(code, sums, [code.shift(x, k, width) for x in inputs], vectors)
    rest = builder.sub(end, whole)
    with builder.if_then(builder.icmp_signed(">", rest, INT64(0)), likely=False):
        vectors = [code.load_first_halves(code.shift(address, whole, 2), rest, group()) for address in weights]
        add(code, sums, [code.shift(x, whole, width) for x in inputs], vectors)
    found = [builder.load(place) for place in sums]
    padded = found + found[: len(weights)] if len(inputs) == 3 else found  # `totals` goes by halves
    total = code.totals(padded)
    code.store(builder.fadd(code.pick(total, total, list(range(len(found)))), code.load(out, len(found))), out)


def _add_exact(code: Code, sums: list, inputs: list, weights: list) -> None:
    """Products of float32 numbers, a group's even columns first."""
    for start, widen in ((0, code.widen_even), (lanes(), code.widen_odd)):
        wide = [widen(vector) for vector in weights]
        for r, x in enumerate(inputs):
            _add_row(code, sums[r * len(weights) :], code.multiply_add, code.load(code.shift(x, start, 4)), wide)


def _add_pairs(code: Code, sums: list, inputs: list, weights: list) -> None:
    for r, x in enumerate(inputs):
        _add_row(code, sums[r * len(weights) :], code.add_pairs, code.load_halves(x, group()), weights)


def _add_row(code: Code, sums: list, add, x, weights: list) -> None:
    for place, weight in zip(sums, weights, strict=False):
        code.builder.store(add(x, weight, code.builder.load(place)), place)
