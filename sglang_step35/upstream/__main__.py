"""`python -m sglang_step35.upstream`: every row of the table that differs from the SGLang on the path.

Unlike the doctor it does not ask for the pinned version: docs/upgrading.md runs it on the next one.
"""

import importlib.metadata
import sys
import warnings
from collections.abc import Iterator

from sglang_step35 import SGLANG_VERSION
from sglang_step35.upstream import TABLE, Upstream, UpstreamError, check
from sglang_step35.upstream.check import parameter_names, resolve


def main() -> int:
    """Print what differs; 1 when anything does."""
    warnings.simplefilter("ignore")
    differences = [text for row in TABLE if (text := difference(row))]
    for text in differences:
        print(text)
    installed = importlib.metadata.version("sglang")
    print(f"sglang {installed} against {SGLANG_VERSION}: {len(differences)} of {len(TABLE)} rows differ")
    return 1 if differences else 0


def difference(row: Upstream) -> str:
    """What differs, both signatures and the parameters that came and went; empty when nothing does."""
    try:
        check(row)
    except UpstreamError as error:
        return "\n".join((str(error), *_changes(row)))
    except Exception as error:  # a module of another version may fail in any way when it is imported
        return f"{row.path} cannot be imported here: {type(error).__name__}: {error}"
    return ""


def _changes(row: Upstream) -> Iterator[str]:
    try:
        found = parameter_names(resolve(row.path))
    except (ImportError, AttributeError, TypeError, ValueError):
        return
    for label, names, others in (("new", found, row.parameters or found), ("gone", row.parameters or (), found)):
        if changed := [name for name in names if name not in others]:
            yield f"    {label}: {' '.join(changed)}"


if __name__ == "__main__":
    sys.exit(main())
