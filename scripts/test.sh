#!/usr/bin/env bash
# Set up and run all tests; arguments go to pytest (for example: scripts/test.sh -m "not server").
# Two processes share the files; `-n 0` runs all in one, as a debugger needs it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
# More threads slow tiny models down, most of all beside a server on the same cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
