"""Seeds of sampling requests on CPUs, in plain torch where SGLang has only kernels."""

import random

import torch
from torch import Tensor

from sglang_step35.speculative.sampling import hashed_uniform

_COLUMN_STREAMS = 1 << 20  # away from the streams of the speculative worker


def keep_seeds(result: None, info, batch, vocab_size: int) -> None:
    """Give SGLang's SamplingBatchInfo `info` the seeds its requests came with.

    A request without one gets a random seed: merged batches need seeds for all requests or none.
    """
    if info.sampling_seed is None:
        seeds = [req.sampling_params.sampling_seed for req in batch.reqs]
        seeds = [random.getrandbits(62) if seed is None else seed for seed in seeds]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=info.device)


def filter_min_p(stock, probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **options):
    """Around SGLang's sampler in plain torch, which takes min-p or seeds, but fails for both.

    What min-p removes lies behind what it keeps, so removed from `probs` [B, V] beforehand it changes no rank and no
    sum that top-k and top-p go by; the seeded draw needs no normalised probabilities.
    """
    if need_min_p_sampling and sampling_seed is not None:
        probs = probs.masked_fill(probs < probs.amax(-1, keepdim=True) * min_ps[:, None], 0)
        need_min_p_sampling = False
    return stock(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **options)


def hash32(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """Uniform numbers in [0, 2**32) of (seed, position, column), for SGLang's seeded sampler.

    seed, positions: [B]. col_indices: [V]. Returns [B, V] int64.
    """
    streams = _COLUMN_STREAMS + col_indices.long()
    uniform = hashed_uniform(seed.long()[:, None], positions.long()[:, None], streams)
    return (uniform * 2**32).long()
