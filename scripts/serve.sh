#!/usr/bin/env bash
# Serve with a preset: scripts/serve.sh PRESET [sglang serve arguments]
# The preset is configs/PRESET.yaml; arguments given here win over it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config=$root/configs/${1:-}.yaml

if [ $# -eq 0 ] || [ ! -f "$config" ]; then
  echo "usage: scripts/serve.sh PRESET [sglang serve arguments]; presets:" >&2
  for file in "$root"/configs/*.yaml; do
    echo "  $(basename "$file" .yaml)" >&2
  done
  exit 2
fi
shift

sglang=$root/.venv/bin/sglang
[ -x "$sglang" ] || sglang=sglang # installed outside of scripts/setup.sh
exec "$sglang" serve --config "$config" "$@"
