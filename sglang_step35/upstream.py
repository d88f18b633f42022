"""Checks of the installed SGLang against `upstream_table`: version, names and signatures.

The plug-in checks the entries it hooks before it registers anything, the test suite checks all.
"""

import importlib.metadata
import inspect
import pkgutil

from sglang_step35 import SGLANG_VERSION
from sglang_step35.upstream_table import TABLE, Upstream


class UpstreamError(RuntimeError):
    """The installed SGLang is not the one this package was written against."""


def check_version() -> None:
    """Raise UpstreamError unless the pinned SGLang version is installed."""
    installed = importlib.metadata.version("sglang")
    if installed != SGLANG_VERSION:
        raise UpstreamError(
            f"sglang-step35 is written against sglang {SGLANG_VERSION}, found {installed}: "
            f"install sglang=={SGLANG_VERSION} or the sglang-step35 release for {installed}"
        )


def check(entry: Upstream) -> None:
    """Raise UpstreamError when the entry's name is missing or its parameters differ."""
    try:
        target = pkgutil.resolve_name(entry.path)
    except (ImportError, AttributeError) as error:
        raise UpstreamError(f"sglang has no {entry.path} ({error})") from error
    if entry.parameters is None:
        return
    found = tuple(_parameter_names(target))
    if found != entry.parameters:
        raise UpstreamError(f"{entry.path} takes {found}, sglang-step35 was written against {entry.parameters}")


def check_hooked() -> None:
    """Check the version and every hooked entry; raises UpstreamError on the first difference."""
    check_version()
    for entry in TABLE:
        if entry.hooked:
            check(entry)


def _parameter_names(target) -> list[str]:
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [marks.get(p.kind, "") + p.name for p in inspect.signature(target).parameters.values()]
