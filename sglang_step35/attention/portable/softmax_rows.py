"""Rows of an online softmax, compiled by numba: loops that LLVM turns into vector code by itself. All is float32.

Letters: D head size, K keys of a block.

A row's state [2] is its largest score so far, -inf before the first, and the sum of its weights 2 ** (score - largest):
scores are in powers of 2. Rows are given by their addresses, which numba compiles in half the time that views take.
"""

import numpy as np
from numba import carray, njit, types
from numba.extending import overload

from sglang_step35.attention.portable.tiles import pointer

_LEAN = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")  # called by compiled code alone
EXACT = dict(fastmath={"contract", "nsz"}, **_LEAN)
NEVER = np.float32(-np.inf)


@njit(**EXACT)
def floats(address, count):
    return carray(pointer(address), count, np.float32)


@njit(**EXACT)
def fill(address, count, value):
    x = floats(address, count)
    for i in range(count):
        x[i] = value


@njit(**EXACT)
def _multiply(address, count, factor):
    x = floats(address, count)
    for i in range(count):
        x[i] *= factor


@njit(**EXACT)
def weigh(scores, keys, low, high, sums, size, state):
    """A block more: scores [K] become weights, 0 outside low .. high; sums [D] and state are brought to their scale."""
    low, high = min(low, keys), max(low, high)
    fill(scores, low, np.float32(0))
    fill(scores + high * 4, keys - high, np.float32(0))
    if low == high:
        return
    seen, count, state = scores + low * 4, high - low, floats(state, 2)
    largest = _largest(seen, count)
    if not largest <= state[0]:
        factor = np.exp2(state[0] - largest)
        _multiply(sums, size, factor)
        state[0] = largest
        state[1] *= factor
    powers(seen, count, state[0])
    state[1] += _sum(seen, count)


@njit(**EXACT)
def merge(sums, state, more, more_state, size):
    """The same row over other keys is added to the first."""
    sums, state, more, more_state = floats(sums, size), floats(state, 2), floats(more, size), floats(more_state, 2)
    if more_state[0] == NEVER:
        return
    largest = max(state[0], more_state[0])
    ours, theirs = np.exp2(state[0] - largest), np.exp2(more_state[0] - largest)
    for d in range(size):
        sums[d] = sums[d] * ours + more[d] * theirs
    state[0], state[1] = largest, state[1] * ours + more_state[1] * theirs


@njit(fastmath={"nnan", "nsz"}, **_LEAN)
def _largest(address, count):
    """LLVM makes a vector loop of it only without NaN; with one any result will do, as the row's sum becomes NaN."""
    x = floats(address, count)
    found = NEVER
    for i in range(count):
        found = x[i] if x[i] > found else found
    return found


@njit(**EXACT)
def powers(address, count, shift):
    """x = 2 ** (x - shift), at most 1, within 2e-7 of itself: a polynomial, and the whole part as exponent bits."""
    x = floats(address, count)
    for i in range(count):
        power = x[i] - shift
        power = np.float32(-126) if power < np.float32(-126) else power  # a NaN stays one
        whole = np.floor(power + np.float32(0.5))
        rest = power - whole
        value = np.float32(1.5403530e-4)
        value = value * rest + np.float32(1.3333558e-3)
        value = value * rest + np.float32(9.6181291e-3)
        value = value * rest + np.float32(5.5504109e-2)
        value = value * rest + np.float32(2.4022651e-1)
        value = value * rest + np.float32(6.9314718e-1)
        value = value * rest + np.float32(1)
        x[i] = value * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(fastmath={"reassoc", "contract", "nsz"}, **_LEAN)
def _sum(address, count):
    x = floats(address, count)
    found = np.float32(0)
    for i in range(count):
        found += x[i]
    return found


def widen(value):
    """A stored number as float32; an unsigned one is the upper half of its bits."""
    raise NotImplementedError("for compiled code alone")


@overload(widen, inline="always")
def _widen(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: np.float32(value)


def narrow(stored, value):
    """A float32 as it is stored, rounded to the nearest, of two to the even one."""
    raise NotImplementedError("for compiled code alone")


@overload(narrow, inline="always")
def _narrow(stored, value):
    if stored.dtype != types.uint16:
        return lambda stored, value: stored(value)

    def upper_half(stored, value):
        bits = np.float32(value).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return upper_half
