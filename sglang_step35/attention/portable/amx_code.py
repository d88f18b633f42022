"""What attention by AMX needs besides the unit's own products, as LLVM code: weights of keys, and tiles of values.

Scores come transposed, SIDE queries side by side and keys one below the other, so that softmax goes down the lanes and
no lane waits for another. Tiles and pairs are those of `packed.amx_tiles`. Memory is given by its address.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sglang_step35.packed.amx_tiles import LINE, SIDE, TILE, call
from sglang_step35.vector_code import FLOAT, INT16, INT32, INT64, Code, vector

_HALVES = 2 * SIDE  # numbers of bfloat16 in a line, which is as long as SIDE numbers of float32
# Of a polynomial for 2 ** x, abs(x) <= 0.5, the highest power's first: the smallest largest error of its degree.
_POWER_OF_2 = 0.009570103661, 0.055917865948, 0.240247448393, 0.693121814052, 0.999999261425
_SUMS, _WEIGHTS, _VALUES = (0, 1, 2, 3), (4, 5), (6, 7)  # registers of tiles


@intrinsic
def fetch(typing, places, count, size):
    """`size` bytes at each of these addresses begin to come nearer."""

    def generate(context, builder, signature, arguments):
        places, count, size = arguments
        code = Code(builder)
        with cgutils.for_range(builder, count) as loop:
            code.prefetch_all(code.integer(code.shift(places, loop.index, 8)), size)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def hide(typing, scores, pitch, tiles, key, low, high):
    """Scores of the keys from number `key` on become -inf but for low <= key < high.

    scores: [tiles, SIDE keys, SIDE queries] float32, tiles `pitch` bytes apart. low, high: [SIDE] int32.
    """

    def generate(context, builder, signature, arguments):
        scores, pitch, tiles, key, low, high = arguments
        code, numbers = Code(builder), vector(INT32, SIDE)
        low, high = (builder.load(code.at(numbers, address), align=4) for address in (low, high))
        never = _all(float("-inf"))
        with cgutils.for_range(builder, tiles) as outer, cgutils.for_range(builder, INT64(SIDE)) as inner:
            number = builder.add(key, builder.add(builder.mul(outer.index, INT64(SIDE)), inner.index))
            number = code.splat(builder.trunc(number, INT32), SIDE)
            seen = builder.and_(builder.icmp_signed(">=", number, low), builder.icmp_signed("<", number, high))
            place = code.shift(builder.add(scores, builder.mul(outer.index, pitch)), inner.index, LINE)
            code.store(builder.select(seen, code.load(place, SIDE), never), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def weigh(typing, scores, pitch, tiles, scale, state, factors, to):
    """Scores, as in `hide`, become pairs of weights 2 ** (scale * (score - largest)): to [SIDE * tiles / 2, SIDE].

    state [2, SIDE] float32: the largest score so far, -inf before the first, and the sum of the weights, which are
    brought up to date. factors [SIDE] float32: what earlier results are to be multiplied by.
    """

    def generate(context, builder, signature, arguments):
        scores, pitch, tiles, scale, state, factors, to = arguments
        code = Code(builder)
        scale = code.splat(scale, SIDE)
        before, totals = code.load(state, SIDE), code.load(code.shift(state, 1, LINE), SIDE)
        largest = _largest(code, scores, pitch, tiles, before)
        nothing = builder.fcmp_ordered("==", largest, _all(float("-inf")))
        shift = builder.fneg(builder.select(nothing, _all(0.0), builder.fmul(largest, scale)))
        same = builder.fcmp_ordered("==", before, largest)  # which spares the multiplying; both may be -inf
        factor = builder.select(same, _all(1.0), _power(code, code.multiply_add(before, scale, shift)))
        code.store(factor, factors)
        found = cgutils.alloca_once_value(builder, builder.fmul(totals, factor))
        with cgutils.for_range(builder, tiles) as outer, cgutils.for_range(builder, INT64(SIDE // 2)) as inner:
            pair = code.shift(builder.add(scores, builder.mul(outer.index, pitch)), inner.index, 2 * LINE)
            pair = [code.load(code.shift(pair, i, LINE), SIDE) for i in range(2)]
            weights = [_power(code, code.multiply_add(score, scale, shift)) for score in pair]
            builder.store(builder.fadd(builder.load(found), builder.fadd(*weights)), found)
            line = builder.add(builder.mul(outer.index, INT64(SIDE // 2)), inner.index)
            code.store_halves(code.narrow_pairs(*weights), code.shift(to, line, LINE))
        code.store(largest, state)
        code.store(builder.load(found), code.shift(state, 1, LINE))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, types.float32, *[types.int64] * 3), generate


def _largest(code: Code, scores, pitch, tiles, before):
    """Of each lane, and of `before`; four chains, since every step of one waits for the step before."""
    builder = code.builder
    chains = [cgutils.alloca_once_value(builder, before) for _ in range(4)]
    with cgutils.for_range(builder, tiles) as outer, cgutils.for_range(builder, INT64(SIDE // 4)) as inner:
        four = code.shift(builder.add(scores, builder.mul(outer.index, pitch)), inner.index, 4 * LINE)
        for i, chain in enumerate(chains):
            score = code.load(code.shift(four, i, LINE), SIDE)
            builder.store(code.larger(score, builder.load(chain)), chain)
    found = [builder.load(chain) for chain in chains]
    return code.larger(code.larger(found[0], found[1]), code.larger(found[2], found[3]))


def _power(code: Code, x):
    """2 ** x within 3e-6 of itself, a hundredth of what the rounding of weights takes away; 0 below -200."""
    builder = code.builder
    x = code.larger(_all(-200.0), x)  # a NaN stays one
    whole = builder.call(_function(builder, "llvm.rint.v16f32", x.type), [x])
    rest, value = builder.fsub(x, whole), _all(_POWER_OF_2[0])
    for factor in _POWER_OF_2[1:]:
        value = code.multiply_add(value, rest, _all(factor))
    operands = *[x.type] * 3, INT16, INT32
    scale = _function(builder, "llvm.x86.avx512.mask.scalef.ps.512", x.type, *operands)
    return builder.call(scale, [value, whole, value, INT16(-1), INT32(4)])


def _function(builder, name: str, result, *operands):
    kind = ir.FunctionType(result, operands or [result])
    return cgutils.get_or_insert_function(builder.module, kind, name)


@intrinsic
def lay_values(typing, places, keys, size, to):
    """Values of bfloat16 [size] at addresses places [keys], in pairs of keys: to [size / SIDE, keys / 32, TILE]."""

    def generate(context, builder, signature, arguments):
        places, keys, size, to = arguments
        code = Code(builder)
        apart = builder.mul(keys, INT64(TILE // _HALVES))  # of the tiles of neighbouring columns
        orders = [[i + j // 2 + _HALVES * (j % 2) for j in range(_HALVES)] for i in (0, SIDE)]
        with cgutils.for_range(builder, builder.sdiv(keys, INT64(2))) as loop:
            own = [code.integer(code.shift(code.shift(places, loop.index, 16), i, 8)) for i in range(2)]
            line = code.shift(to, loop.index, LINE)
            with cgutils.for_range_slice(builder, INT64(0), size, INT64(_HALVES)) as (d, _):
                pair = [code.load_halves(code.shift(place, d, 2), _HALVES) for place in own]
                column = builder.sdiv(d, INT64(SIDE))
                for i, order in enumerate(orders):
                    number = builder.add(column, INT64(i))
                    code.store_halves(code.pick(*pair, order), builder.add(line, builder.mul(number, apart)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def add_products(typing, weights, count, values, tiles, size, sums):
    """sums [count * SIDE, size] float32 += weights times values; count: 1 or 2.

    weights [count, tiles, TILE], values [size / SIDE, tiles, TILE] in pairs; size: a multiple of 2 * SIDE.
    """

    def generate(context, builder, signature, arguments):
        weights, count, values, tiles, size, sums = arguments
        for rows in (1, 2):
            columns = cgutils.for_range_slice(builder, INT64(0), size, INT64(2 * SIDE))
            with builder.if_then(builder.icmp_signed("==", count, INT64(rows))), columns as (d, _):
                _add_columns(Code(builder), weights, rows, values, tiles, size, sums, d)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


def _add_columns(code: Code, weights, rows: int, values, tiles, size, sums, d) -> None:
    """2 * SIDE columns from d on."""
    builder = code.builder
    apart, stride = builder.mul(tiles, INT64(TILE)), builder.mul(size, INT64(4))
    values = builder.add(values, builder.mul(apart, builder.sdiv(d, INT64(SIDE))))
    products = [(i, j) for i in range(rows) for j in range(2)]
    corner = code.shift(sums, d, 4)
    places = [builder.add(corner, builder.mul(stride, INT64(SIDE * i))) for i in range(rows)]
    places = {(i, j): code.shift(places[i], j, LINE) for i, j in products}
    for i, j in products:
        call(builder, "tileloadd64", _SUMS[2 * i + j], places[i, j], stride)
    with cgutils.for_range(builder, tiles) as loop:
        offset = builder.mul(loop.index, INT64(TILE))
        for base, registers in ((weights, _WEIGHTS[:rows]), (values, _VALUES)):
            for number, register in enumerate(registers):
                place = builder.add(builder.add(base, offset), builder.mul(apart, INT64(number)))
                call(builder, "tileloadd64", register, place, INT64(LINE))
        for i, j in products:
            call(builder, "tdpbf16ps", _SUMS[2 * i + j], _WEIGHTS[i], _VALUES[j])
    for i, j in products:
        call(builder, "tilestored64", _SUMS[2 * i + j], places[i, j], stride)


def _all(number: float):
    return ir.Constant(vector(FLOAT, SIDE), [number] * SIDE)
