"""Time of a round's target distributions, by partial selection and by sorting the whole vocabulary.

    python -m scripts.benchmarks.sampling --requests 1 4 16

Four rows a request, temperature 1, logits whose spread is that of confident text ("peaked") or of nearly none
("flat"). Prints a table and, as the last line, JSON. No SGLang needed.
"""

import argparse
import json
import statistics
import time

import torch
from torch import Tensor

from sglang_step35.speculative.filters import Filters

ROWS = 4  # of a verify step
SPREAD = {"peaked": 4.0, "flat": 0.5}  # standard deviation of the logits
FILTERS = {"top_p 0.95": (1 << 30, 0.95), "top_k 50, top_p 0.95": (50, 0.95)}


def by_sorting(probs: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """The rule written plainly; [R, V] -> [R, V]."""
    ordered, index = probs.sort(dim=-1, descending=True)
    keep = torch.arange(probs.shape[-1]) < top_ks[:, None]
    keep &= ordered.cumsum(-1) - ordered <= top_ps[:, None]
    kept = torch.zeros_like(probs).scatter_(-1, index, ordered * keep)
    return kept / kept.sum(-1, keepdim=True)


def median_ms(run, repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def measure(probs: Tensor, top_k: int, top_p: float, repeats: int) -> dict:
    top_ks, top_ps = torch.full((len(probs),), top_k), torch.full((len(probs),), top_p)
    filters = Filters(top_ks=top_ks, top_ps=top_ps)
    difference = (filters.apply(probs) - by_sorting(probs, top_ks, top_ps)).abs().max()
    return {
        "kept": round(float((filters.apply(probs) > 0).sum(-1).float().mean())),
        "largest_difference": float(difference),
        "selection_ms": median_ms(lambda: filters.apply(probs), repeats),
        "sort_ms": median_ms(lambda: by_sorting(probs, top_ks, top_ps), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--vocab", type=int, default=128896)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    print(f"{'requests':>8} {'logits':>7} {'filters':>21} {'kept':>6} {'selection ms':>13} {'sort ms':>8} {'ratio':>6}")
    for requests in options.requests:
        for spread, scale in SPREAD.items():
            logits = torch.randn(requests * ROWS, options.vocab, generator=torch.Generator().manual_seed(requests))
            probs = (logits * scale).softmax(-1)
            for name, (top_k, top_p) in FILTERS.items():
                result = measure(probs, top_k, top_p, options.repeats)
                results.append({"requests": requests, "logits": spread, "filters": name, **result})
                ratio = result["sort_ms"] / result["selection_ms"]
                print(
                    f"{requests:8d} {spread:>7} {name:>21} {result['kept']:6d} {result['selection_ms']:13.2f} "
                    f"{result['sort_ms']:8.1f} {ratio:6.1f}"
                )
    print(json.dumps({**vars(options), "results": results}))


if __name__ == "__main__":
    main()
