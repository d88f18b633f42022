"""Every SGLang name we rely on, as a table by rooms, and its check.

`python -m sglang_step35.upstream` shows what differs in another version; docs/upgrading.md is the procedure. SGLang is
pinned exactly, so the table is a contract, not a compatibility layer. The plug-in checks the rows it hooks before it
registers anything; the test suite checks all of them, and that the package uses no name without one.
"""

from sglang_step35.upstream import (
    attention,
    graphs,
    guards,
    hicache,
    http,
    model,
    objects,
    parsers,
    quantization,
    registration,
    speculative,
)
from sglang_step35.upstream.check import UpstreamError, check, check_version
from sglang_step35.upstream.row import Upstream

__all__ = ["TABLE", "Upstream", "UpstreamError", "check", "check_hooked", "check_version"]

TABLE: tuple[Upstream, ...] = (
    *registration.ROWS,
    *model.ROWS,
    *quantization.ROWS,
    *attention.ROWS,
    *speculative.ROWS,
    *graphs.ROWS,
    *guards.ROWS,
    *hicache.ROWS,
    *objects.ROWS,
    *http.ROWS,
    *parsers.ROWS,
)


def check_hooked() -> None:
    """Check the version and every hooked row; raises UpstreamError on the first difference."""
    check_version()
    for row in TABLE:
        if row.hooked:
            check(row)
