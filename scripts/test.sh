#!/usr/bin/env bash
# Set up and run all tests; arguments go to pytest (for example: scripts/test.sh -m "not server").
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m pytest "$@"
