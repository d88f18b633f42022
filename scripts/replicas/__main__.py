"""Replicas of one server behind sglang-router, kept alive until SIGTERM.

    scripts/replicas.sh PRESET [--replicas 2] [--host 127.0.0.1] [--port 8000] [--logs FOLDER] [sglang serve arguments]

The router listens on --host and --port, the replicas on the ports after it on 127.0.0.1. A replica that ends is started
again. SIGHUP restarts one after the other without failing a request; SIGTERM ends all when their answers are complete.
"""

import argparse
import signal
import tempfile
import time
from pathlib import Path

from scripts.replicas.supervisor import Replicas

LOOK_SECONDS = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--host", default="127.0.0.1", help="of the router; 0.0.0.0: reachable from elsewhere")
    parser.add_argument("--port", type=int, default=8000, help="of the router")
    parser.add_argument("--logs", type=Path, help="folder; default: a new one in the temporary folder")
    options, serve = parser.parse_known_args()
    logs = options.logs or Path(tempfile.mkdtemp(prefix="replicas-"))
    logs.mkdir(parents=True, exist_ok=True)
    received = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: received.append(number))
    say(f"{options.replicas} replicas start, logs in {logs}")
    replicas = Replicas(tuple(serve), options.replicas, logs, options.port, host=options.host)
    say(f"ready: {replicas.router.url}")
    while not received or (received.pop(0) == signal.SIGHUP and replicas.roll(say) is None):
        replicas.revive(say)
        time.sleep(LOOK_SECONDS)
    say("draining")
    replicas.close()


def say(text: str) -> None:
    print(f"replicas: {text}", flush=True)


if __name__ == "__main__":
    main()
