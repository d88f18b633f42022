"""Products and experts of one layer of the published widths: plain torch before, ggml's kernels now, in turns.

    python -m scripts.benchmarks.kernels --threads 2

Dense: [M, 4096] x [2560, 4096]. Experts: 32 resident ones of 4096 x 1280, top-8, random routing. Activations are
bfloat16, the weights rotate through more memory than a cache holds. "share" is of the read bandwidth measured between
the runs, by bytes as the checkpoint has them, for experts those of the distinct ones chosen; "of M=1" is the time a
byte takes, by that of one row. Prints a table and, as the last line, JSON.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from scripts.benchmarks.real_width.bandwidth import rate
from sglang_step35 import huge_pages
from sglang_step35.packed import ik_check, ik_kernel, plain
from sglang_step35.packed.blocks import BlockTensor
from sglang_step35.packed.ggml import TYPES, GGMLTensor
from sglang_step35.packed.grouped import CODES, GroupedTensor
from sglang_step35.packed.prepare import prepared
from sglang_step35.packed.tensor import PackedTensor

HIDDEN, ROWS, SIZE, EXPERTS, TOP_K = 4096, 2560, 1280, 32, 8
FORMATS = ("BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "INT4", "FP8")
READ_BYTES = 1 << 28  # of a sum, whose speed is the read bandwidth


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    reason = ik_check.why_not()
    if reason is not None:
        raise SystemExit(reason)
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'':8} {'':8} {'M':>4} {'before':>9} {'now':>9} {'ratio':>6} {'GB/s':>6} {'share':>6} {'of M=1':>7}")
    results = []
    for layer, measure in (("dense", dense), ("experts", experts)):
        for name in options.formats:
            first = None
            for rows, before, now, bandwidth, size in measure(name, options):
                first = first or now / size
                result = dict(layer=layer, format=name, rows=rows, before_ms=before, now_ms=now)
                result |= dict(bandwidth=bandwidth, share=size / (now / 1e3) / bandwidth, of_one_row=now / size / first)
                results.append(result)
                ratios = f"{bandwidth / 1e9:6.1f} {result['share']:6.2f} {now / size / first:7.2f}"
                shown = f"{before:9.2f} {now:9.2f} {before / now:6.1f}" if before else f"{'-':>9} {now:9.2f} {'':6}"
                print(f"{layer:8} {name:8} {rows:4} {shown} {ratios}", flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")
    print(json.dumps({**vars(options), "results": results}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--before-up-to", type=int, default=16, help="most rows to run the plain experts for")
    parser.add_argument("--copies", type=int, default=12, help="of the dense matrix, read one after the other")
    return parser.parse_args()


def dense(name: str, options: argparse.Namespace) -> Iterator[tuple]:
    """(rows, ms before, ms now, read bandwidth, bytes of the matrix)."""
    sources = [weights(name, ROWS, HIDDEN) for _ in range(options.copies)]
    for rows in options.rows:
        x = torch.randn(rows, HIDDEN).bfloat16()
        before = lambda matrix, x=x: torch_linear(x, matrix)
        now = lambda matrix, x=x: ik_kernel.linear(x, (matrix,))
        yield rows, *in_turns(before, now, sources, [prepared(m) for m in sources], options), sources[0].nbytes


def torch_linear(x: torch.Tensor, matrix: PackedTensor) -> torch.Tensor:
    """What a layer did before: torch's own product where it is unquantised."""
    if isinstance(matrix, GGMLTensor) and matrix.type.name == "BF16":
        return torch.nn.functional.linear(x, matrix.data.view(torch.bfloat16))
    return plain.linear(x, (matrix,))


def experts(name: str, options: argparse.Namespace) -> Iterator[tuple]:
    """(rows, ms before, ms now, read bandwidth, bytes of the distinct experts)."""
    shapes = (EXPERTS, SIZE, HIDDEN), (EXPERTS, SIZE, HIDDEN), (EXPERTS, HIDDEN, SIZE)
    source = [weights(name, *shape) for shape in shapes]
    ready = [prepared(part) for part in source]
    size = sum(part.nbytes for part in source) / EXPERTS
    for rows in options.rows:
        x = torch.randn(rows, HIDDEN).bfloat16() / 64
        routes = [(torch.rand(rows, TOP_K), torch.rand(rows, EXPERTS).topk(TOP_K).indices) for _ in range(8)]
        before = None
        if rows <= options.before_up_to:
            before = lambda route, x=x: plain.experts(x, *source, *route, None)
        now = lambda route, x=x: ik_kernel.experts(x, *ready, *route, None)
        distinct = sum(len(ids.unique()) for _, ids in routes) / len(routes)
        yield rows, *in_turns(before, now, routes, routes, options), size * distinct


def in_turns(
    before: Callable | None, now: Callable, old: list, new: list, options: argparse.Namespace
) -> tuple[float | None, float, float]:
    """Median ms of both and median read bandwidth in bytes a second, one after the other; the slow one less often."""
    now(new[0])
    slow, fast, reads = [], [], []
    data = torch.zeros(READ_BYTES // 4)
    for turn in range(options.repeats):
        if before is not None and turn % 3 == 0:
            slow.append(clock(before, old[turn % len(old)]))
        reads.append(rate(data))
        fast += [clock(now, new[(3 * turn + i) % len(new)]) for i in range(3)]
    return median(slow) * 1e3 if slow else None, median(fast) * 1e3, median(reads) * 1e9


def clock(function: Callable, *arguments) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def weights(name: str, *shape: int) -> PackedTensor:
    """Random ones of this format."""
    *leading, columns = shape
    if name == "BF16":
        data = torch.empty(shape, dtype=torch.bfloat16)
        huge_pages.use(data)  # as parameters do; `prepared` sees to the others
        return GGMLTensor(TYPES[name], data.normal_().view(torch.uint8))
    if name == "INT4":
        codes = torch.randint(0, 256, (*leading, columns // 2), dtype=torch.uint8)
        return GroupedTensor(CODES[name], codes, torch.full((*leading, columns // 128), 0.01, dtype=torch.bfloat16))
    if name == "FP8":
        values = torch.randn(shape).mul_(60).to(torch.float8_e4m3fn)
        scales = torch.full((*leading[:-1], leading[-1] // 128, columns // 128), 0.01)
        return BlockTensor(values, scales, (128, 128))
    kind = TYPES[name]
    data = torch.randint(0, 256, (*leading, columns // kind.block, kind.size), dtype=torch.uint8)
    scale = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    for at in {"Q6_K": (208,), "Q4_K": (0, 2)}.get(name, (0,)):
        data[..., at : at + 2] = scale
    return GGMLTensor(kind, data.flatten(-2))


if __name__ == "__main__":
    main()
