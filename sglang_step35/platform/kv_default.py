"""How many tokens of KV a server on the portable platform keeps when its flags do not say.

SGLang takes a share of the memory that is free once the weights are loaded. Weights mapped from their file count as
free there, and nothing bounds the share by what requests could use; so the planner answers instead.
"""

import logging
from functools import cache

from sglang.srt.utils.common import get_free_cpu_memory

from sglang_step35.checkpoint.base import DamagedFile
from sglang_step35.config import ModelSpec
from sglang_step35.planner import GIB, PlanError
from sglang_step35.planner.hardware import PORTABLE, Hardware
from sglang_step35.planner.plan import Wish, make_plan
from sglang_step35.planner.stored import Stored, read

logger = logging.getLogger(__name__)

FLOAT32 = ("float32", "float")  # values of --dtype


def max_total_tokens(server_args) -> int | None:
    """--max-total-tokens for these arguments; None where the user decided, or SGLang has to.

    From the memory that is free now, less the weights: at most what the largest allowed batch of full contexts uses.
    Raises ValueError, with the flag to set, where the weights leave no room.
    """
    if server_args.max_total_tokens is not None or server_args.mem_fraction_static is not None:
        return None
    found = facts(server_args.model_path)
    if found is None:
        return None
    spec, stored = found
    wide = server_args.dtype in FLOAT32
    machine = _machine(get_free_cpu_memory(), server_args.dp_size, _widened(stored) if wide else 0)
    context = server_args.context_length
    wish = Wish(
        context=None if context is None else min(context, spec.max_position),
        concurrency=server_args.max_running_requests,
        page_size=server_args.page_size or 1,
        swa_ratio=server_args.swa_full_tokens_ratio,
        mtp=server_args.speculative_algorithm is not None,
        kv_bytes=4 if wide else 2,
    )
    try:
        plan = make_plan(spec, machine, wish, stored)
    except PlanError:  # a layout of layers that SGLang sizes in another way
        return None
    if plan.best is None:
        raise ValueError(
            f"{stored.path}: {plan.resident / GIB:.1f} GiB of weights leave no room for KV in {machine.label}; use a "
            f"smaller quantisation, end other processes, or set --max-total-tokens to try all the same"
        )
    tokens = plan.best.pools.full_tokens
    logger.info("KV for %d tokens beside %.1f GiB of weights (--max-total-tokens)", tokens, plan.resident / GIB)
    return tokens


@cache
def facts(model_path: str) -> tuple[ModelSpec, Stored] | None:
    """What a checkpoint is and holds; None for another model's, a hub's or a damaged one: the loader tells."""
    try:
        spec, stored = read(model_path)
    except (OSError, ValueError, DamagedFile):
        return None
    return None if stored is None else (spec, stored)


def name_flags(stock, configurator, **options):
    """Around `KVCacheConfigurator.configure`. Raises MemoryError, with what to set, where the host does not give it."""
    try:
        return stock(configurator, **options)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's allocator
            raise
        raise MemoryError(
            f"the KV pools do not fit ({str(error).splitlines()[0]}): set --max-total-tokens, --max-running-requests "
            "or --context-length lower, end other processes, or raise this one's limit (ulimit -v, the container's)"
        ) from error


def _machine(free: int, replicas: int, used: int) -> Hardware:
    """One replica's share of the free memory, `used` bytes of it taken."""
    label = f"the {free / GIB:.1f} GiB that are free"
    return Hardware(label, 1, free // replicas, "bf16", PORTABLE, system=used)


def _widened(stored: Stored) -> int:
    """What 16-bit weights take beyond their file when they are loaded in float32."""
    if stored.quantization != "bf16":
        return 0
    return sum(count for name, count in stored.types if name in ("BF16", "F16"))
