"""Names in a profiler's trace for the parts of a round; without a profiler they cost one look at a flag."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.autograd import profiler

P, R = ParamSpec("P"), TypeVar("R")

ROUND, PREFILL, VERIFY, MTP = "step35.round", "step35.prefill", "step35.verify", "step35.mtp"


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
