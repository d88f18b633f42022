#!/usr/bin/env bash
# Set up, serve the packaged nano checkpoint on the CPU, stream one completion from it, stop.
#   scripts/quickstart.sh                        the demonstration
#   scripts/quickstart.sh --serve [--port PORT]  the same, then keep serving until Ctrl-C
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FREE_PORT='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'

keep=false port='' server='' log=''
while [ $# -gt 0 ]; do
  case $1 in
    --serve) keep=true ;;
    --port) port=${2:?--port needs a number} && shift ;;
    *) sed -n '2,4s/^# //p' scripts/quickstart.sh >&2 && exit 2 ;;
  esac
  shift
done

stop_server() { # the HTTP server first, then what is left of its process group (scheduler, detokenizer)
  [ -n "$server" ] || return 0
  # SIGTERM waits 5 s for requests to drain, SIGINT does not; where this script was started with & it is ignored.
  kill -INT "$server" 2>/dev/null || true
  wait_gone "$server" 4 || kill -TERM "$server" 2>/dev/null || true
  wait_gone "$server" 10 || true
  wait_gone "-$server" 2 || true
  kill -KILL -- "-$server" 2>/dev/null || true
}

wait_gone() { # wait_gone PID_OR_-GROUP SECONDS
  for _ in $(seq $(($2 * 10))); do
    kill -0 -- "$1" 2>/dev/null || return 0
    sleep 0.1
  done
  return 1
}

finish() {
  local status=$?
  trap - EXIT INT TERM
  stop_server
  if [ "$status" -eq 0 ] || [ "$status" -ge 128 ]; then
    rm -f "$log"
  elif [ -s "$log" ]; then
    tail -n 40 "$log" | cut -c 1-300 >&2
    echo "quickstart: failed; the whole server log is in $log" >&2
  fi
  exit "$status"
}

bash scripts/setup.sh
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

log=$(mktemp)
port=${port:-$(.venv/bin/python -c "$FREE_PORT")}
model=$(.venv/bin/python -m sglang_step35 nano)

echo "quickstart: starting sglang serve with configs/nano-cpu.yaml on port $port"
# SGLANG_PLATFORM asks for our portable CPU platform by name, also where there is a GPU.
# One thread: on busy cores the threads of so small a model spend their time waiting for each other.
set -m # gives the server a process group of its own
SGLANG_PLATFORM=step35 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} bash scripts/serve.sh nano-cpu \
  --model-path "$model" --port "$port" >"$log" 2>&1 </dev/null &
server=$!
disown # else bash reports how it ended
set +m

.venv/bin/python scripts/quickstart.py "http://127.0.0.1:$port" --server-pid "$server"

if $keep; then
  echo "quickstart: serving step3p5-nano on http://127.0.0.1:$port, log in $log; Ctrl-C stops"
  while kill -0 "$server" 2>/dev/null; do sleep 1; done
  echo "quickstart: the server stopped" >&2
  exit 1
fi
