#!/usr/bin/env bash
# Replicas behind sglang-router: scripts/replicas.sh PRESET [--replicas 2] [--port 8000] [sglang serve arguments]
# Presets are those of scripts/serve.sh. SIGHUP restarts one replica after the other, SIGTERM drains.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=$PWD/.venv/bin
[ -x "$bin/sglang" ] || bin= # installed outside of scripts/setup.sh

if [ $# -eq 0 ] || [[ $1 == -* ]]; then
  exec "${bin:+$bin/}python" -m scripts.replicas --help
fi
config=$("${bin:+$bin/}python" -m sglang_step35 preset "$1")
shift
exec "${bin:+$bin/}python" -m scripts.replicas --config "$config" "$@"
