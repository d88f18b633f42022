"""Functions that numba compiles for this CPU, kept on disk: compiling takes seconds in every process.

numba looks at the file of the function that it compiles and not at those of the functions and constants in it. A digest
of all of them, as a variable that the compiled function closes over, is part of its key.
"""

from hashlib import sha256
from pathlib import Path

from numba import cfunc, types

# A step of ggml's graphs (`ggml_custom1_op_t`): result, an operand, the thread, their number, and data.
GRAPH_STEP = types.void(types.voidptr, types.voidptr, types.intc, types.intc, types.voidptr)

SHARED = "vector_code", "compiled_numbers"  # modules that compiled functions of several packages call


def digest(*modules: str) -> int:
    """Of the source files of these modules of the package, such as `packed.row_kernels`; never 0."""
    root = Path(__file__).parent
    sources = b"".join(root.joinpath(*module.split(".")).with_suffix(".py").read_bytes() for module in modules)
    return int.from_bytes(sha256(sources).digest()[:7], "little") | 1


def callback(signature):
    """`cfunc` of this signature, kept beside its file or, where that is not writable, in the user's cache; where numba
    finds neither, not at all."""

    def compile(function):
        try:
            return cfunc(signature, cache=True)(function)
        except RuntimeError:
            return cfunc(signature)(function)

    return compile
