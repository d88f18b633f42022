"""Decode rounds between the chunks of a long prompt: on a CPU a chunk takes seconds, of a large model half a minute.

SGLang runs prefills first. Behind the chunks of one long prompt every other request would wait until the last of them,
minutes on a CPU, without a token.
"""

CHUNK = 2048  # tokens; SGLang's default grows with the memory, to 8,192, and nobody is served within a chunk
# For 0.9B parameters 3 % of a chunk's time where one request decodes, a quarter where sixteen do.
ROUNDS = 16


def set_defaults(server_args) -> None:
    """Where the user named neither a chunk's size nor an interval."""
    if server_args.chunked_prefill_size is None:
        server_args.chunked_prefill_size = CHUNK
    if server_args.prefill_decode_interval is None:
        server_args.prefill_decode_interval = ROUNDS
    # With 0, SGLang's default, a scheduler without anything to decode would sleep for as many rounds.
    server_args.prefill_decode_interval_min_bs = max(1, server_args.prefill_decode_interval_min_bs)


def arm_behind_chunks(stock, scheduler, batch) -> None:
    """Around `Scheduler._arm_prefill_decode_interval`: only where the batch leaves a part of a prompt for later.

    Behind whole prompts it would hold others back that could join the batch at once.
    """
    if scheduler.chunked_req is not None:
        stock(scheduler, batch)
