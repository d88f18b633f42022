"""A file of the published widths, opened: load time, resident memory against file size, first tokens.

    python -m scripts.benchmarks.real_width.opened --formats Q4_0 Q8_0 int4 --layers 2

Hidden 4096, 288 experts of 1280, 64 and 96 heads of 128, vocabulary 128,896: a dense layer and `--layers` - 1 with
experts (2.5 GB each in Q4_0). Written once into --folder, served by `sglang serve --device cpu` in float32 arithmetic,
and compared with a plain reference on weights that other libraries dequantise. Prints a table and, as the last line,
JSON. Needs free disk for the files and about 4 GB of memory beside them.
"""

import argparse
import json
import re
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import psutil
import torch

from scripts.benchmarks.real_width import checkpoint, reference
from scripts.benchmarks.real_width.files import INT4, MIB, files_of, size, slice_file
from sglang_step35.bench.servers import Server, ServerPool

PROMPT = [3000, 17, 99, 120_000, 5, 88_888, 64, 2, 777, 31_415, 9, 41]
TOLERANCE = 1e-3  # of a log-probability; float32 sums of 4096 terms in another order


@dataclass(frozen=True)
class Memory:
    """MiB of all the server's processes. mapped: pages of the checkpoint, counted once; private: what they wrote."""

    mapped: int
    private: int


@dataclass(frozen=True)
class Result:
    format: str
    file_mib: int
    load_s: float  # SGLang's own figure: reading and placing the weights
    start_s: float  # from the command to a healthy server
    loaded: Memory
    served: Memory  # after the tokens
    tokens_s: float  # for prompt and tokens
    ids: list[int]
    reference_ids: list[int]
    logprob_difference: float

    @property
    def right(self) -> bool:
        return self.ids == self.reference_ids and self.logprob_difference < TOLERANCE


def main() -> None:
    options = parse_options()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="real-width-"))
    folder.mkdir(parents=True, exist_ok=True)
    fields = checkpoint.slice_fields(options.layers, options.vocabulary)
    results = []
    try:
        for form in options.formats:
            results.append(measure(form, slice_file(form, folder, fields), fields, options))
            print(line(results[-1]) if len(results) > 1 else f"{HEADER}\n{line(results[-1])}", flush=True)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    print(json.dumps({"layers": options.layers, "results": [asdict(r) | {"right": r.right} for r in results]}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = [kind.name for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]
    parser.add_argument("--formats", nargs="+", default=["Q4_0", INT4], choices=[*kinds, INT4])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=128_896)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="keeps the files, and takes those already there")
    return parser.parse_args()


def measure(form: str, target: Path, fields: dict, options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as logs:
        pool, started = ServerPool(Path(logs)), time.monotonic()
        try:
            server = pool.get(
                "--model-path", str(target), "--device", "cpu", "--dtype", "float32", "--skip-tokenizer-init",
                "--context-length", "1024", "--max-total-tokens", "4096", "--skip-server-warmup",
            )  # fmt: skip
            start_s, loaded = time.monotonic() - started, memory(server, target)
            started = time.monotonic()
            sampling = {"temperature": 0, "max_new_tokens": options.tokens, "ignore_eos": True}
            body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
            answer = server.post("/generate", body, timeout=1800).json()
            tokens_s, served = time.monotonic() - started, memory(server, target)
            load_s = float(re.findall(r"Load weight end. elapsed=([\d.]+) s", server.log.read_text())[0])
        finally:
            pool.stop_all()
    read = reference.int4_reader(target) if form == INT4 else reference.gguf_reader(target)
    ids = answer["output_ids"]
    expected = reference.logprobs(read, fields, [*PROMPT, *ids[:-1]], len(PROMPT) - 1)
    found = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    difference = (expected.gather(1, torch.tensor(ids)[:, None])[:, 0] - found).abs().max()
    return Result(
        form, size(target) // MIB, load_s, round(start_s, 1), loaded, served, round(tokens_s, 1), ids,
        expected.argmax(-1).tolist(), float(difference),
    )  # fmt: skip


def memory(server: Server, target: Path) -> Memory:
    """From the kernel's account of every mapping."""
    root, ours = psutil.Process(server.process.pid), {str(file.resolve()) for file in files_of(target)}
    private = 0
    mapped: dict[str, int] = {}
    for process in (root, *root.children(recursive=True)):
        for mapping in process.memory_maps(grouped=True):
            if mapping.path in ours:
                # Processes share these pages: the one that has touched most stands for all.
                mapped[mapping.path] = max(mapped.get(mapping.path, 0), mapping.rss - mapping.anonymous)
                private += mapping.anonymous
            else:
                private += mapping.private_dirty
    return Memory(sum(mapped.values()) // MIB, private // MIB)


HEADER = (
    f"{'format':8}{'file MiB':>9}{'load s':>8}{'start s':>8}{'mapped, private MiB':>21}"
    f"{'after tokens':>15}{'tokens s':>9}{'logprob':>9}  first tokens"
)


def line(r: Result) -> str:
    verdict = "right" if r.right else f"WRONG: {r.reference_ids} expected"
    return (
        f"{r.format:8}{r.file_mib:9d}{r.load_s:8.2f}{r.start_s:8.1f}{r.loaded.mapped:12d}{r.loaded.private:9d}"
        f"{r.served.mapped:8d}{r.served.private:7d}{r.tokens_s:9.1f}{r.logprob_difference:9.0e}  {r.ids} {verdict}"
    )


if __name__ == "__main__":
    main()
