"""Numbers in memory, for functions that numba compiles. Loops of these become vector code by LLVM itself."""

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload

LEAN = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")  # called by compiled code alone
EXACT = dict(fastmath={"contract", "nsz"}, **LEAN)
_LOG2E = np.float32(1.4426950408889634)


@intrinsic
def pointer(typing, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@njit(**EXACT)
def floats(address, count):
    return carray(pointer(address), count, np.float32)


@njit(**EXACT)
def rounded_up(count, step):
    """The first multiple of a step from there on."""
    return (count + step - 1) // step * step


@njit(**EXACT)
def power_of_2(x):
    """2 ** x, within 2e-7 of itself, for x up to 126; 2 ** -126 below. Loops of it become vector code.

    A polynomial, and the whole part as exponent bits.
    """
    x = np.float32(-126) if x < np.float32(-126) else x  # a NaN stays one
    whole = np.floor(x + np.float32(0.5))
    rest = x - whole
    value = np.float32(1.5403530e-4)
    value = value * rest + np.float32(1.3333558e-3)
    value = value * rest + np.float32(9.6181291e-3)
    value = value * rest + np.float32(5.5504109e-2)
    value = value * rest + np.float32(2.4022651e-1)
    value = value * rest + np.float32(6.9314718e-1)
    value = value * rest + np.float32(1)
    return value * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(**EXACT)
def silu(x):
    return x / (np.float32(1) + power_of_2(min(x * -_LOG2E, np.float32(126))))


@njit(**EXACT)
def gated(gate, up, limit):
    """min(silu(gate), limit) * clamp(up, -limit, limit); limit 0: none."""
    gate = silu(gate)
    if limit > 0:
        gate, up = min(gate, limit), min(max(up, -limit), limit)
    return gate * up


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
