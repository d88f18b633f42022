"""Rows of an online softmax, compiled by numba: loops that LLVM turns into vector code by itself. All is float32.

Letters: D head size, K keys of a block.

A row's state [2] is its largest score so far, -inf before the first, and the sum of its weights 2 ** (score - largest):
scores are in powers of 2. Rows are given by their addresses, which numba compiles in half the time that views take.
"""

import numpy as np
from numba import njit

from sglang_step35.compiled_numbers import EXACT, LEAN, floats, power_of_2

NEVER = np.float32(-np.inf)


@njit(**EXACT)
def fill(address, count, value):
    x = floats(address, count)
    for i in range(count):
        x[i] = value


@njit(**EXACT)
def multiply(address, count, factor):
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
        multiply(sums, size, factor)
        state[0] = largest
        state[1] *= factor
    _powers(seen, count, state[0])
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


@njit(fastmath={"nnan", "nsz"}, **LEAN)
def _largest(address, count):
    """LLVM makes a vector loop of it only without NaN; with one any result will do, as the row's sum becomes NaN."""
    x = floats(address, count)
    found = NEVER
    for i in range(count):
        found = x[i] if x[i] > found else found
    return found


@njit(**EXACT)
def _powers(address, count, shift):
    """x = 2 ** (x - shift), at most 1."""
    x = floats(address, count)
    for i in range(count):
        x[i] = power_of_2(x[i] - shift)


@njit(fastmath={"reassoc", "contract", "nsz"}, **LEAN)
def _sum(address, count):
    x = floats(address, count)
    found = np.float32(0)
    for i in range(count):
        found += x[i]
    return found
