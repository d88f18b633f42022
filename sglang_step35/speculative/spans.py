"""Names in a profiler's trace for the parts of a round; without a profiler they cost one look at a flag."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.autograd import profiler

P, R = ParamSpec("P"), TypeVar("R")

ROUND, PREFILL, VERIFY, MTP = "step35.round", "step35.prefill", "step35.verify", "step35.mtp"
WIDTH = "step35.width."  # and the tokens of the verify step inside


def spanned(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Calls of the decorated function appear as spans of this name while torch's profiler runs."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not profiler._is_profiler_enabled:  # torch's own short cut
                return function(*args, **kwargs)
            with profiler.record_function(name):
                return function(*args, **kwargs)

        return run

    return decorate


def of_width(width: int) -> AbstractContextManager:
    """A span that names the width of the verify step inside."""
    return profiler.record_function(f"{WIDTH}{width}") if profiler._is_profiler_enabled else nullcontext()
