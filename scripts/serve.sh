#!/usr/bin/env bash
# Serve with a preset: scripts/serve.sh PRESET [sglang serve arguments]
# Presets are the package's, see `python -m sglang_step35 preset`; arguments given here win over them.
set -euo pipefail
bin=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin
[ -x "$bin/sglang" ] || bin= # installed outside of scripts/setup.sh

if [ $# -eq 0 ]; then
  echo "usage: scripts/serve.sh PRESET [sglang serve arguments]; presets:" >&2
  "${bin:+$bin/}python" -m sglang_step35 preset >&2
  exit 2
fi
config=$("${bin:+$bin/}python" -m sglang_step35 preset "$1")
shift
exec "${bin:+$bin/}sglang" serve --config "$config" "$@"
