#!/usr/bin/env bash
# Lint, format and types, all settings in pyproject.toml; `scripts/lint.sh --fix` mends what can be mended.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin
if [ "${1:-}" = --fix ]; then
  "$bin/ruff" check --fix . && "$bin/ruff" format .
else
  "$bin/ruff" check . && "$bin/ruff" format --check .
fi
"$bin/mypy"
