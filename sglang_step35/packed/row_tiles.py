"""Rows of activations by rows of bfloat16 or FP8 weights, as LLVM vector code.

A tile of ROWS rows of activations and `weights_at_once()` of weights has its sums in registers, so that each vector
that is read serves several. Columns come in groups, as many as a vector of weights has.
"""

from collections.abc import Callable
from typing import NamedTuple

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sglang_step35.vector_code import FLOAT, INT64, Code, lanes

ROWS = 4
_FLOAT8_UNIT = 256.0  # `Code.float8`'s


def weights_at_once() -> int:
    """Rows of weights that a tile reads side by side."""
    return lanes() // ROWS


def group() -> int:
    return 2 * lanes()


@intrinsic
def add_products(typing, kind, x, pitch, rows, first, end, places, later, scales, sums):
    """sums [rows, W] += x [rows, pitch] times W rows of weights at addresses places [W], W = `weights_at_once()`.

    Of columns first .. end, where first is a multiple of `group()`. later [W]: addresses of weights that are wanted
    next. kind: np.float32 and np.uint16: bfloat16 weights, by x in float32, of a group's numbers 0, 2, .. before 1, 3,
    .., or in bfloat16; x is 0 from its last column up to a whole group. np.uint8: FP8 weights by x in float32, both in
    order, columns in whole groups; scales [2 + W] int64: how many columns share a scale, how many of these lie before
    column 0, and where each row of weights has its float32 scales.
    """

    def generate(context, builder, signature, arguments):
        _, x, pitch, rows, first, end, places, later, scales, sums = arguments
        code, number, way = Code(builder), weights_at_once(), _WAYS[str(kind.dtype)]
        width = way.width
        tiles = builder.sdiv(builder.add(rows, INT64(ROWS - 1)), INT64(ROWS))
        whole = builder.mul(builder.sdiv(rows, INT64(ROWS)), INT64(ROWS))
        weights = [code.integer(code.shift(places, j, 8)) for j in range(number)]

        def tile(row, count: int):
            own = [code.shift(x, builder.mul(builder.add(row, INT64(r)), pitch), width) for r in range(count)]
            # All tiles together fetch what `later` says, each its share: a row for each of them or for several.
            share = builder.mul(builder.sdiv(row, INT64(ROWS)), INT64(number))
            ahead = [builder.sdiv(builder.add(share, INT64(j)), tiles) for j in range(number)]
            ahead = [code.integer(code.shift(later, j, 8)) for j in ahead]
            _tile(code, way, own, weights, ahead, first, end, scales, code.shift(sums, row, 4 * number))

        with cgutils.for_range_slice(builder, INT64(0), whole, INT64(ROWS)) as (row, _):
            tile(row, ROWS)
        for count in range(1, ROWS):
            with builder.if_then(builder.icmp_signed("==", builder.sub(rows, whole), INT64(count))):
                tile(whole, count)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 9), generate


@intrinsic
def narrow_row(typing, weights, columns, scales, to):
    """FP8 weights [columns] times their scales, rounded to bfloat16: to [columns] uint16; needs `multiplies_pairs()`.

    columns: whole groups. scales: as of `add_products`, of one row.
    """

    def generate(context, builder, signature, arguments):
        weights, columns, scales, to = arguments
        code = Code(builder)

        def some(start, stop, factors) -> None:
            with cgutils.for_range_slice(builder, start, stop, INT64(lanes())) as (k, _):
                wide = builder.fmul(code.float8(code.shift(weights, k, 1), lanes()), factors[0])
                code.store_halves(code.narrow(wide), code.shift(to, k, 2))

        _for_scales(code, INT64(0), columns, scales, 1, some)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


class _Way(NamedTuple):
    """How products are made. width, weight: bytes of a number of x and of a weight. is_scaled: by `scales`."""

    width: int
    weight: int
    load: Callable
    add: Callable
    is_scaled: bool = False


def _tile(code: Code, way: _Way, inputs: list, weights: list, ahead: list, first, end, scales, out) -> None:
    builder = code.builder
    sums = code.zeros(len(inputs) * len(weights))
    whole = builder.mul(builder.sdiv(end, INT64(group())), INT64(group()))

    def columns(start, stop, factors) -> None:
        with cgutils.for_range_slice(builder, start, stop, INT64(group())) as (k, _):
            for address in ahead:
                code.prefetch(code.shift(address, k, way.weight))
            vectors = [way.load(code, code.shift(address, k, way.weight)) for address in weights]
            way.add(code, sums, [code.shift(x, k, way.width) for x in inputs], vectors, factors)

    if way.is_scaled:
        _for_scales(code, first, end, scales, len(weights), columns)
    else:
        columns(first, whole, None)
        rest = builder.sub(end, whole)
        with builder.if_then(builder.icmp_signed(">", rest, INT64(0)), likely=False):
            vectors = [code.load_first_halves(code.shift(address, whole, 2), rest, group()) for address in weights]
            way.add(code, sums, [code.shift(x, whole, way.width) for x in inputs], vectors, None)
    found = [builder.load(place) for place in sums]
    padded = found + found[: len(weights)] if len(inputs) == 3 else found  # `totals` goes by halves
    total = code.totals(padded)
    code.store(builder.fadd(code.pick(total, total, list(range(len(found)))), code.load(out, len(found))), out)


def _for_scales(code: Code, first, end, scales, count: int, columns: Callable) -> None:
    """columns(start, stop, a scale for each row of weights in all lanes) for all that share these."""
    builder, smaller = code.builder, lambda a, b: code.builder.select(code.builder.icmp_signed("<", a, b), a, b)
    width, skipped = code.integer(scales), code.integer(code.shift(scales, 1, 8))
    rows = [code.integer(code.shift(scales, 2 + j, 8)) for j in range(count)]
    low, high = builder.add(first, skipped), builder.add(end, skipped)
    last = builder.sdiv(builder.add(high, builder.sub(width, INT64(1))), width)
    with cgutils.for_range_slice(builder, builder.sdiv(low, width), last, INT64(1)) as (number, _):
        begin = builder.mul(number, width)
        start, stop = builder.select(builder.icmp_signed("<", begin, low), low, begin), builder.add(begin, width)
        factors = [code.number(code.shift(row, number, 4)) for row in rows]
        factors = [builder.fmul(factor, FLOAT(_FLOAT8_UNIT)) for factor in factors]
        spread = [code.splat(factor, lanes()) for factor in factors]
        columns(builder.sub(start, skipped), builder.sub(smaller(stop, high), skipped), spread)


def _add_exact(code: Code, sums: list, inputs: list, weights: list, _factors) -> None:
    """Products of float32 numbers, a group's even columns first."""
    for start, widen in ((0, code.widen_even), (lanes(), code.widen_odd)):
        wide = [widen(vector) for vector in weights]
        for r, x in enumerate(inputs):
            _add_row(code, sums[r * len(weights) :], code.multiply_add, code.load(code.shift(x, start, 4)), wide)


def _add_pairs(code: Code, sums: list, inputs: list, weights: list, _factors) -> None:
    for r, x in enumerate(inputs):
        _add_row(code, sums[r * len(weights) :], code.add_pairs, code.load_halves(x, group()), weights)


def _add_float8(code: Code, sums: list, inputs: list, weights: list, factors: list) -> None:
    """weights: of each row the two halves of a group."""
    for half in range(2):
        wide = [code.builder.fmul(pair[half], factor) for pair, factor in zip(weights, factors, strict=True)]
        for r, x in enumerate(inputs):
            row = code.load(code.shift(x, half * lanes(), 4))
            _add_row(code, sums[r * len(weights) :], code.multiply_add, row, wide)


def _add_row(code: Code, sums: list, add, x, weights: list) -> None:
    for place, weight in zip(sums, weights, strict=False):
        code.builder.store(add(x, weight, code.builder.load(place)), place)


def _halves(code: Code, address):
    return code.load_halves(address, group())


def _float8(code: Code, address) -> tuple:
    return tuple(code.float8(code.shift(address, half * lanes(), 1), lanes()) for half in range(2))


_WAYS = {  # by the name of `add_products`'s kind
    "float32": _Way(4, 2, _halves, _add_exact),
    "uint16": _Way(2, 2, _halves, _add_pairs),
    "uint8": _Way(4, 1, _float8, _add_float8, is_scaled=True),
}
