"""Decode rounds between the chunks of a long prompt: on a CPU a chunk takes seconds, of a large model half a minute.

SGLang runs prefills first. Behind the chunks of one long prompt every other request would wait until the last of them,
minutes on a CPU, without a token. Within a chunk nobody is served at all: no abort is seen, and `/health` fails after
20 seconds without a sign of the scheduler.
"""

import os

from sglang_step35.planner.reserve import TIGHT_CHUNK
from sglang_step35.planner.weights import active_parameters
from sglang_step35.platform.cores import threads_on
from sglang_step35.platform.kv_default import facts

MOST, FEWEST = TIGHT_CHUNK, 256  # tokens of a chunk; fewer leave experts too few rows each
CHUNK_SECONDS = 8
PACE = 100e9  # operations a second of a core, two for each weight and token; 60 to 150 seen, by format and CPU
# Of a chunk for each round behind it. 0.9B parameters decode for 3 % of the time so where one request does, for a
# quarter where sixteen do.
TOKENS_A_ROUND = 128


def set_defaults(server_args) -> None:
    """Where the user named neither a chunk's size nor an interval."""
    if server_args.chunked_prefill_size is None:
        server_args.chunked_prefill_size = _chunk(server_args)
    if server_args.prefill_decode_interval is None:
        server_args.prefill_decode_interval = max(1, server_args.chunked_prefill_size // TOKENS_A_ROUND)
    # With 0, SGLang's default, a scheduler without anything to decode would sleep for as many rounds.
    server_args.prefill_decode_interval_min_bs = max(1, server_args.prefill_decode_interval_min_bs)


def _chunk(server_args) -> int:
    """Tokens that a replica's cores take CHUNK_SECONDS for, by arithmetic alone: a power of two."""
    found = facts(server_args.model_path)
    if found is None:
        return MOST
    cores = threads_on(sorted(os.sched_getaffinity(0))) * server_args.nnodes / server_args.dp_size
    tokens = CHUNK_SECONDS * PACE * cores / (2 * active_parameters(found[0]))
    return min(MOST, max(FEWEST, 1 << int(tokens).bit_length() - 1))


def arm_behind_chunks(stock, scheduler, batch) -> None:
    """Around `Scheduler._arm_prefill_decode_interval`: only where the batch leaves a part of a prompt for later.

    Behind whole prompts it would hold others back that could join the batch at once.
    """
    if scheduler.chunked_req is not None:
        stock(scheduler, batch)
