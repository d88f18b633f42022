#!/usr/bin/env bash
# What only a machine with a GPU can show: scripts/gpu_check.sh [STEP... | all] [OPTION...]; without a step, the list.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LIMIT=480 # seconds for each step

python=.venv/bin/python
[ -x "$python" ] || python=python3 # enough for the list and for the first set-up
steps=()
while [ $# -gt 0 ] && [[ $1 != -* ]]; do
  steps+=("$1")
  shift
done
[ ${#steps[@]} -gt 0 ] || exec "$python" -m scripts.gpu_check "$@"
[ "${steps[*]}" != all ] || mapfile -t steps < <("$python" -m scripts.gpu_check --names)

run_step() { # run_step NAME OPTION...: set-up brings what the others run on
  if [ "$1" = setup ]; then timeout "$LIMIT" bash scripts/setup.sh || return; fi
  if [ ! -x .venv/bin/python ]; then
    echo "gpu_check: .venv is missing: run scripts/gpu_check.sh setup first" >&2
    return 2
  fi
  timeout --kill-after=30 "$LIMIT" .venv/bin/python -m scripts.gpu_check "$@"
}

failed=()
for step in "${steps[@]}"; do
  echo "== $step"
  run_step "$step" "$@" || failed+=("$step ($?)")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu_check: failed: ${failed[*]}" >&2
  exit 1
fi
