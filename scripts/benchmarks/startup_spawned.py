"""`sglang serve` as it starts without `platform.process_start`; the spawned children import this module as well.

python -m scripts.benchmarks.startup_spawned serve --model-path ...
"""

import sys
from contextlib import nullcontext

from sglang_step35.platform import process_start

process_start.collection_paused = nullcontext
process_start.why_spawn = lambda server_args: "the benchmark asks for it"

if __name__ == "__main__":
    from sglang.cli.main import main

    sys.exit(main())
