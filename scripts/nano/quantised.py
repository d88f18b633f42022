"""What each format costs the nano checkpoint: held-out loss and accept length on rounded weights.

    python -m scripts.nano.quantised [--checkpoint DIR] [--also FILE.gguf ...]

Every row takes the stored weights, rounds the matrices to the nearest value of a format, and measures what that means
in float32 arithmetic: what a server loses that computes right. Calibrating tools (AutoRound, GPTQ, an importance
matrix) lose less. FP8, INT8 and INT4 round the linear layers of backbone and MTP layers, as quantisers do; GGUF rounds
embedding and head as well, as llama.cpp does. `--also` measures files as they are. Prints a table and, as the last
line, JSON.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from scripts.nano import checkpoint, data, evaluate, losses, tokenizer
from scripts.nano.config import Plan, Shape
from sglang_step35.assets import NANO
from sglang_step35.checkpoint.gguf import GGUFFiles

NEW_TOKENS = 96
LINEAR = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj|share_expert\.\w+_proj|moe\.\w+_proj|eh_proj)\.weight"
)
FP8_MAX = 448.0  # largest E4M3


def fp8_blocks(weight: Tensor, block: int = 128) -> Tensor:
    """[..., N, K] in E4M3, a float32 scale for a block; the last blocks are what is left."""
    rows, columns = weight.shape[-2:]
    out = torch.empty_like(weight)
    for top in range(0, rows, block):
        for left in range(0, columns, block):
            part = weight[..., top : top + block, left : left + block]
            scale = part.abs().amax((-2, -1), keepdim=True).clamp(min=1e-12) / FP8_MAX
            out[..., top : top + block, left : left + block] = (part / scale).to(torch.float8_e4m3fn).float() * scale
    return out


def integers(bits: int, group: int | None) -> Callable[[Tensor], Tensor]:
    """Symmetric codes, a bfloat16 scale for `group` columns (the last group is what is left), or for a row."""
    most = 2 ** (bits - 1) - 1

    def rounded(weight: Tensor) -> Tensor:
        parts = weight.split(group or weight.shape[-1], dim=-1)
        return torch.cat([_group(part, most) for part in parts], dim=-1)

    return rounded


def _group(part: Tensor, most: int) -> Tensor:
    scale = (part.abs().amax(-1, keepdim=True) / most).clamp(min=1e-12).bfloat16().float()
    return (part / scale).round().clamp(-most - 1, most) * scale


def ggml(kind: GGMLQuantizationType) -> Callable[[Tensor], Tensor]:
    """The `gguf` package's rounding; it reads K-quants but cannot write them."""

    def rounded(weight: Tensor) -> Tensor:
        packed = gguf.quants.quantize(weight.contiguous().numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())

    return rounded


@dataclass(frozen=True)
class Format:
    """bits: of a rounded weight, its share of the scales included. everything: embedding, head and gates too."""

    name: str
    bits: float
    rounded: Callable[[Tensor], Tensor]
    everything: bool = False

    def weights(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.rounded(weight) if self._takes(name, weight) else weight for name, weight in stored.items()}

    def _takes(self, name: str, weight: Tensor) -> bool:
        if self.everything:  # llama.cpp keeps the router in float32
            return weight.dim() > 1 and not name.endswith("moe.gate.weight")
        return LINEAR.fullmatch(name) is not None


FORMATS = (
    Format("bf16", 16, lambda weight: weight),
    Format("FP8, blocks of 128 x 128", 8.002, fp8_blocks),
    Format("INT8, a scale a row", 8.1, integers(8, None)),
    Format("INT4, groups of 32", 4.5, integers(4, 32)),
    Format("INT4, groups of 128", 4.125, integers(4, 128)),
    Format("Q8_0", 8.5, ggml(GGMLQuantizationType.Q8_0), everything=True),
    Format("Q4_0", 4.5, ggml(GGMLQuantizationType.Q4_0), everything=True),
)


@dataclass(frozen=True)
class Row:
    name: str
    bits: float | None
    heldout_loss: float  # nats a token
    accept_length: float  # greedy
    accept_length_sampled: float  # temperature 0.8, drafts drawn as the worker does


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=NANO, help="a folder that scripts.train_nano wrote")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="GGUF files of it, made by other tools")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = checkpoint.load_weights(Shape(), args.checkpoint)
    stored = {name: weight.clone() for name, weight in model.state_dict().items()}
    measure = _measure(args.checkpoint, args.prompts)
    print(f"{'format':28}{'bits':>7}{'held-out loss':>15}{'accept length':>15}{'at 0.8':>8}")
    rows = []
    for name, bits, weights in [
        *((form.name, form.bits, form.weights) for form in FORMATS),
        *((path.name, None, lambda _, path=path: from_gguf(path)) for path in args.also),
    ]:
        model.load_state_dict(weights(stored))
        row = Row(name, bits, *measure(model))
        rows.append(asdict(row))
        print(
            f"{row.name:28}{row.bits or '':>7}{row.heldout_loss:15.4f}{row.accept_length:15.3f}"
            f"{row.accept_length_sampled:8.3f}",
            flush=True,
        )
    print("Q4_K: the gguf package reads it but cannot write it, and nano's rows are no multiples of its 256 weights")
    print(json.dumps({"checkpoint": str(args.checkpoint), "prompts": args.prompts, "rows": rows}))


def from_gguf(path: Path) -> dict[str, Tensor]:
    """The dequantised weights of a GGUF file, without copies of embedding and head."""
    tensors = ((name, t if isinstance(t, Tensor) else t.dequantize()) for name, t in GGUFFiles(path).tensors())
    copies = ("shared_head.output.weight", "layers.embed_tokens.weight")
    return {name: tensor for name, tensor in tensors if not name.endswith(copies)}


def _measure(folder: Path, count: int) -> Callable:
    """(held-out loss, accept length greedy, at temperature 0.8) of a model, as training_report.json has them."""
    plan, tok = Plan(), tokenizer.load(folder)
    heldout = data.read_corpus(plan.heldout_percent).heldout
    rows = data.fixed_rows(data.pack(list(heldout.values()), tok, plan.seed), 32, 512 + losses.EXTRA)
    prompts = json.loads((folder / "heldout_prompts.json").read_text())[:count]
    ids = [tok.encode(prompt["text"], add_special_tokens=False) for prompt in prompts]

    def measure(model) -> tuple[float, float, float]:
        lengths = (
            evaluate.speculation(model, ids, NEW_TOKENS, temperature, plan.seed)["accept_length"]
            for temperature in (0.0, 0.8)
        )
        return evaluate.heldout_loss(model, rows), *lengths

    return measure


if __name__ == "__main__":
    main()
