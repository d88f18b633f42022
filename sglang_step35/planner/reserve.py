"""What SGLang keeps free on a device: activations, CUDA graphs and its own runtime.

The arithmetic of SGLang 0.5.23, `arg_groups/memory_hook.py: handle_gpu_memory_settings`, for one node without
data-parallel attention. Figures in MiB, as there.
"""

from dataclasses import dataclass

LARGE_DEVICE_MIB = 60 * 1024  # above it SGLang reserves at least 10 GiB
LARGE_DEVICE_RESERVE_MIB = 10 * 1024
TIGHT_CHUNK = 2048  # tokens; below it SGLang's own formula stops shrinking

# Up to this much device memory: (MiB, default chunk in tokens, decode graph batch with tp < 4, with tp >= 4).
_TIERS = (
    (20 * 1024, 2048, 8, 8),
    (35 * 1024, 4096, 48, 160),
    (60 * 1024, 4096, 32, 160),
    (90 * 1024, 8192, 256, 512),
    (160 * 1024, 8192, 256, 512),
    (float("inf"), 16384, 512, 512),
)

# Prefill graph sizes in tokens, (first, last, step); the last row runs up to the chunk.
_PREFILL_GRAPHS = ((4, 32, 4), (48, 256, 16), (288, 512, 32), (576, 1024, 64), (1280, 4096, 256), (4608, 1 << 30, 512))


@dataclass(frozen=True)
class Reserve:
    """Memory that is neither weights nor KV: `mib` is what `mem_fraction_static` leaves free."""

    mem_fraction_static: float
    mib: float
    chunk: int  # tokens; --chunked-prefill-size
    graph_batch: int  # largest decode graph, in requests
    tight: bool = False  # chunk and fraction are not SGLang's own, and have to be asked for with flags


def sglang_default(memory_mib: float, tp: int, max_running_requests: int | None = None) -> Reserve:
    """What SGLang takes when told neither --mem-fraction-static nor --chunked-prefill-size.

    max_running_requests: a value given on the command line. EAGLE's own default of 48 is set later and does not count.
    """
    chunk, batch = _defaults(memory_mib, tp, max_running_requests)
    mib = _reserved(chunk, batch, tp)
    if memory_mib > LARGE_DEVICE_MIB:
        mib = max(mib, LARGE_DEVICE_RESERVE_MIB)
    return Reserve(_fraction(memory_mib, mib), mib, chunk, batch)


def tight(memory_mib: float, tp: int, max_running_requests: int | None) -> Reserve:
    """The same formula without the 10 GiB floor, for small chunks and few requests."""
    _, batch = _defaults(memory_mib, tp, max_running_requests)
    mib = _reserved(TIGHT_CHUNK, batch, tp)
    return Reserve(_fraction(memory_mib, mib), mib, TIGHT_CHUNK, batch, tight=True)


def fixed(memory_mib: float, tp: int, fraction: float, max_running_requests: int | None = None) -> Reserve:
    """A given --mem-fraction-static with SGLang's other defaults."""
    chunk, batch = _defaults(memory_mib, tp, max_running_requests)
    return Reserve(fraction, memory_mib * (1 - fraction), chunk, batch)


def prefill_graphs(chunk: int) -> int:
    """How many prefill graphs SGLang captures for chunks of up to `chunk` tokens."""
    return sum(len(range(first, min(last, chunk) + 1, step)) for first, last, step in _PREFILL_GRAPHS)


def _defaults(memory_mib: float, tp: int, max_running_requests: int | None) -> tuple[int, int]:
    """(chunk, largest decode graph) for a device of this size."""
    _, chunk, small, large = next(tier for tier in _TIERS if memory_mib < tier[0])
    batch = small if tp < 4 else large
    return chunk, min(batch, max_running_requests or batch)


def _reserved(chunk: int, graph_batch: int, tp: int) -> float:
    """Metadata, 1.5 MiB for a token of activations, parallel slack, 2 MiB for a decode, 8 for a prefill graph."""
    return 512 + max(chunk, 2048) * 1.5 + tp / 8 * 1024 + graph_batch * 2 + prefill_graphs(chunk) * 8


def _fraction(memory_mib: float, reserved_mib: float) -> float:
    return round((memory_mib - reserved_mib) / memory_mib, 3)
