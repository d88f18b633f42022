"""Few rows of activations times bfloat16 weights, compiled by numba for this CPU: callbacks of `ggml_map_custom1`.

The wheel's own kernel reads four or five neighbouring rows of weights at once. Where several of them share a page of
memory, prefetching seems to fall behind: 11 GB/s on a core that reads 28 (Zen 4, rows of 2 KB). Here weights are read
as two streams that share no page: 30 GB/s for one row of activations, 14 for four. Sums and activations are float32.
Letters: K columns, N rows of a matrix, E matrices, T tokens, P rows of activations.
"""

import ctypes
from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from sglang_step35.numba_cache import callback, digest
from sglang_step35.packed.ik_library import CALLBACK_LIMIT, CTensor

_OPTIONS = dict(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
_CALLBACK = types.void(types.voidptr, types.voidptr, types.intc, types.intc, types.voidptr)
# Where a tensor's fields begin, in words of 8 bytes; its parameters in words of 4.
_NE, _NB, _SRC, _DATA = (getattr(CTensor, name).offset // 8 for name in ("ne", "nb", "src", "data"))
_WORDS = ctypes.sizeof(CTensor) // 8
_LIMIT = CTensor.op_params.offset // 4 + CALLBACK_LIMIT


@intrinsic
def _pointer(_typing, address):
    def generate(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@njit(**_OPTIONS)
def _floats(address, count):
    return carray(_pointer(address), count, np.float32)


@njit(**_OPTIONS)
def _words(address):
    return carray(_pointer(address), _WORDS, np.int64)


@njit(**_OPTIONS)
def _matrix_of(ids, row, slots):
    """Which matrix a row of activations wants; ids: address of their tensor, 0 for none."""
    if ids == 0:
        return np.int64(0)
    data, strides = _words(ids)[_DATA], _words(ids)[_NB + 1]
    return np.int64(carray(_pointer(data + row // slots * strides + row % slots * 4), 1, np.int32)[0])


@njit(**_OPTIONS)
def _matrix(out, number, places, count, limit, part, parts):
    """places [2, P]: addresses of the `count` rows that want this matrix, and of their results."""
    first, second, is_gated = _words(out[_SRC + 1]), _words(out[_SRC + 2]), out[_SRC + 1] != out[_SRC + 2]
    columns, size = first[_NE], first[_NE + 1]
    low, high = size * part // parts, size * (part + 1) // parts
    if number < 0:
        for p in range(count):
            for row in range(low, high):
                _floats(places[1, p], size)[row] = 0
        return
    apart = 0 if is_gated else (high - low + 1) // 2
    for row in range(low, high if is_gated else low + apart):
        other = min(row + apart, high - 1)
        a = _bits(first, number, row, columns)
        b = _bits(second, number, other, columns)
        whole = count // 4 * 4
        for p in range(0, whole, 4):
            sums = _four(a, b, places[0], p, columns)
            for i in range(4):
                _store(_floats(places[1, p + i], size), row, other, sums[i], sums[i + 4], is_gated, limit)
        for p in range(whole, count):
            left, right = _one(a, b, _floats(places[0, p], columns))
            _store(_floats(places[1, p], size), row, other, left, right, is_gated, limit)


@njit(**_OPTIONS)
def _bits(weights, number, row, columns):
    address = weights[_DATA] + number * weights[_NB + 2] + row * weights[_NB + 1]
    return carray(_pointer(address), columns, np.uint16)


@njit(**_OPTIONS)
def _wide(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(**_OPTIONS)
def _one(a, b, x):
    """Two rows of weights [K] times one of activations."""
    ax = bx = np.float32(0)
    for k in range(len(x)):
        ax += _wide(a[k]) * x[k]
        bx += _wide(b[k]) * x[k]
    return ax, bx


@njit(**_OPTIONS)
def _four(a, b, inputs, p, columns):
    """Two rows of weights times four of activations, those at addresses p .. p + 3: a's sums, then b's."""
    x, y = _floats(inputs[p], columns), _floats(inputs[p + 1], columns)
    z, w = _floats(inputs[p + 2], columns), _floats(inputs[p + 3], columns)
    ax = ay = az = aw = bx = by = bz = bw = np.float32(0)
    for k in range(columns):
        left, right = _wide(a[k]), _wide(b[k])
        ax += left * x[k]
        ay += left * y[k]
        az += left * z[k]
        aw += left * w[k]
        bx += right * x[k]
        by += right * y[k]
        bz += right * z[k]
        bw += right * w[k]
    return ax, ay, az, aw, bx, by, bz, bw


@njit(**_OPTIONS)
def _store(out, row, other, left, right, is_gated, limit):
    """Both sums, or what a gated network makes of them; limit 0: none."""
    if not is_gated:
        out[row], out[other] = left, right
        return
    left = left / (np.float32(1) + np.exp(-left))
    if limit > 0:
        left, right = min(left, limit), min(max(right, -limit), limit)
    out[row] = left * right


@cache
def compiled():
    """`multiply`, whose address is one of ggml's callbacks."""
    sources = digest("packed.row_kernels", "packed.ik_library")

    @callback(_CALLBACK)
    def multiply(address, _shape, part, parts, _data):
        """One thread's part: some rows of every matrix that is wanted.

        out [N, slots, T] at `address`; its sources from 1 on: matrices [K, N, E] twice, or of a gated network gate and
        up; x [K, slots or 1, T]; ids [slots, T] int32 where there are several matrices, -1 for none, which gives zeros.
        """
        out = carray(address, _WORDS, np.int64)
        limit = carray(address, 2 * _WORDS, np.float32)[_LIMIT]
        x, ids, slots = _words(out[_SRC + 3]), out[_SRC + 4], out[_NE + 1]
        count = slots * out[_NE + 2] if sources else 0  # for the key of the cache
        places = np.empty((2, count), np.int64)
        for p in range(count):
            number, wanted = _matrix_of(ids, p, slots), 0
            for q in range(count):
                if _matrix_of(ids, q, slots) != number:
                    continue
                if q < p:  # done before
                    break
                token, slot = q // slots, q % slots
                places[0, wanted] = x[_DATA] + token * x[_NB + 2] + slot % x[_NE + 1] * x[_NB + 1]
                places[1, wanted] = out[_DATA] + token * out[_NB + 2] + slot * out[_NB + 1]
                wanted += 1
            if wanted:
                _matrix(out, number, places, wanted, limit, part, parts)

    return multiply
