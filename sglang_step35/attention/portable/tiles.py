"""Query rows by keys where they lie in a pool, as LLVM vector code: what numba's loops do not keep in registers.

A tile of ROWS query rows and some keys, or numbers of their values, has its sums in registers, so that each vector that
is read of a key or value serves ROWS rows and each of a row several keys. A Zen 4 core multiplies at 90 (scores) and
108 (mix) GFLOP/s so, of 115 it can.

Letters: R query rows, a multiple of ROWS, D head size, a multiple of `lanes()`, K keys, a multiple of KEYS_AT_ONCE.

`stored` is how pools hold numbers: np.float32, or np.uint16, the upper half of a float32 (bfloat16). All
else is float32. Memory is given by its address.
"""

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sglang_step35.vector_code import FLOAT, INT64, Code, lanes, vector

ROWS, KEYS_AT_ONCE = 4, 4
_WIDTH = {types.float32: 4, types.uint16: 2}


class _Code(Code):
    """For a pool of numbers of type `stored`."""

    def __init__(self, builder, stored=types.float32):
        super().__init__(builder)
        self.stored = stored

    def load_stored(self, address):
        """A vector of a pool's numbers, widened."""
        return self.load(address) if self.stored == types.float32 else self.widen(self.load_halves(address, lanes()))


@intrinsic
def scores(typing, stored, q, rows, size, places, count, out, pitch, later, ahead):
    """out [R, pitch] of its first K numbers = q [R, D] times keys of type `stored` at addresses places [K].

    later [ahead]: addresses of D numbers that are wanted next.
    """

    def generate(context, builder, signature, arguments):
        _, q, rows, size, places, count, out, pitch, later, ahead = arguments
        code = _Code(builder, stored.dtype)
        step = INT64(lanes() // ROWS)
        with cgutils.for_range_slice(builder, INT64(0), count, step) as (key, _):
            end = builder.add(key, step)
            share = [builder.sdiv(builder.mul(ahead, edge), count) for edge in (key, end)]
            with cgutils.for_range_slice(builder, *share, INT64(1)) as (j, _):
                code.prefetch_all(code.integer(code.shift(later, j, 8)), builder.mul(size, INT64(_WIDTH[code.stored])))
            with cgutils.for_range_slice(builder, INT64(0), rows, INT64(ROWS)) as (row, _):
                _score_tile(code, row, key, q, size, places, out, pitch)
        return context.get_dummy_value()

    return types.void(stored, *[types.int64] * 9), generate


def _score_tile(code: _Code, row, key, q, size, places, out, pitch) -> None:
    builder, keys = code.builder, lanes() // ROWS
    places = code.shift(places, key, 8)
    places = [code.integer(code.shift(places, j, 8)) for j in range(keys)]
    own = [code.shift(q, builder.mul(builder.add(row, INT64(r)), size), 4) for r in range(ROWS)]
    sums = code.zeros(ROWS * keys)
    with cgutils.for_range_slice(builder, INT64(0), size, INT64(lanes())) as (d, _):
        wide = [code.load_stored(code.shift(place, d, _WIDTH[code.stored])) for place in places]
        for r in range(ROWS):
            x = code.load(code.shift(own[r], d, 4))
            for j in range(keys):
                place = sums[r * keys + j]
                builder.store(code.multiply_add(x, wide[j], builder.load(place)), place)
    found = code.totals([builder.load(place) for place in sums])
    for r in range(ROWS):
        part = code.pick(found, found, list(range(r * keys, (r + 1) * keys)))
        to = builder.add(builder.mul(builder.add(row, INT64(r)), pitch), key)
        code.store(part, code.shift(out, to, 4))


@intrinsic
def mix(typing, stored, weights, pitch, rows, size, places, count, sums):
    """sums [R, D] += weights [R, pitch] of K columns times values of type `stored` at addresses places [K]."""

    def generate(context, builder, signature, arguments):
        _, weights, pitch, rows, size, places, count, sums = arguments
        code, most = _Code(builder, stored.dtype), lanes() // ROWS
        wide = builder.mul(builder.sdiv(size, INT64(most * lanes())), INT64(most * lanes()))
        with cgutils.for_range_slice(builder, INT64(0), rows, INT64(ROWS)) as (row, _):
            for vectors, first, end in ((most, INT64(0), wide), (1, wide, size)):
                with cgutils.for_range_slice(builder, first, end, INT64(vectors * lanes())) as (d, _):
                    _mix_tile(code, row, d, vectors, weights, pitch, size, places, count, sums)
        return context.get_dummy_value()

    return types.void(stored, *[types.int64] * 7), generate


def _mix_tile(code: _Code, row, d, vectors: int, weights, pitch, size, places, count, sums) -> None:
    builder, width = code.builder, _WIDTH[code.stored]
    rows = [builder.add(row, INT64(r)) for r in range(ROWS)]
    own = [code.shift(weights, builder.mul(r, pitch), 4) for r in rows]
    to = [code.shift(sums, builder.add(builder.mul(r, size), d), 4) for r in rows]
    to = [[code.shift(address, i * lanes(), 4) for i in range(vectors)] for address in to]
    tile = [[cgutils.alloca_once(builder, vector(FLOAT)) for _ in range(vectors)] for _ in rows]
    for r in range(ROWS):
        for place, address in zip(tile[r], to[r], strict=True):
            builder.store(code.load(address), place)
    with cgutils.for_range(builder, count) as loop:
        value = code.shift(code.integer(code.shift(places, loop.index, 8)), d, width)
        wide = [code.load_stored(code.shift(value, i * lanes(), width)) for i in range(vectors)]
        for r in range(ROWS):
            weight = code.splat(builder.load(code.at(FLOAT, code.shift(own[r], loop.index, 4))), lanes())
            for place, v in zip(tile[r], wide, strict=True):
                builder.store(code.multiply_add(weight, v, builder.load(place)), place)
    for r in range(ROWS):
        for place, address in zip(tile[r], to[r], strict=True):
            code.store(builder.load(place), address)


@intrinsic
def add_one(typing, address):
    """The int64 there as it was; it grows by one, whatever other threads do."""

    def generate(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], INT64.as_pointer())
        return builder.atomic_rmw("add", place, INT64(1), "acq_rel")

    return types.int64(types.int64), generate
