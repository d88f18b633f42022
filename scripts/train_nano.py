"""Trains the nano Step-3.5 checkpoint from nothing but the CPython standard library's source.

    python -m scripts.train_nano --out DIR            all stages
    python -m scripts.train_nano --out DIR --quick    a few minutes, to try the pipeline

Tokenizer, backbone, MTP layers, evaluation; everything is drawn from one seed and budgeted in steps. The state is
kept in DIR/state.pt, and a repeated call goes on from there.

A changed plan needs no new start: every stage leaves DIR/STAGE.pt at its end; copied to DIR/state.pt, training goes on
from there. The rate is constant in the stage "stable", so that one can be made longer in nano/config.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
from pathlib import Path

import torch

from scripts.nano import chats, checkpoint, data, evaluate, loop, losses, tokenizer
from scripts.nano.config import QUICK, Plan, Shape
from scripts.nano.model import NanoStep

MEASURED_PROMPTS, NEW_TOKENS = 100, 96


def prepare(plan: Plan, shape: Shape, out: Path) -> dict:
    """Writes tokenizer, configs and prompts; returns code, chat and held-out tokens, prompts and file names.
    Kept in streams.pt for a resumed call."""
    kept = out / "streams.pt"
    if kept.exists():
        return torch.load(kept, weights_only=False)
    corpus = data.read_corpus(plan.heldout_percent)
    tokenizer.save(tokenizer.train([corpus.train[k] for k in sorted(corpus.train)], shape.vocab), out)
    checkpoint.save_configs(shape, out)
    tok = tokenizer.load(out)
    prompts = data.cut_prompts(corpus.heldout, tok, plan.prompts, plan.seed)
    checkpoint.write_json(out / "heldout_prompts.json", prompts)
    heldout = data.pack(list(corpus.heldout.values()), tok, plan.seed)
    streams = {
        "code": data.pack(list(corpus.train.values()), tok, plan.seed),
        "chat": data.pack_chats(chats.build(corpus.train, tok, plan.chat_examples, plan.seed), tok),
        "heldout": data.fixed_rows(heldout, 32, 512 + losses.EXTRA),
        "prompts": prompts,
        "train_files": len(corpus.train),
        "train_bytes": sum(len(t.encode()) for t in corpus.train.values()),
        "heldout_files": sorted(corpus.heldout),
    }
    torch.save(streams, kept)
    return streams


def measure(model: NanoStep, streams: dict, tok, seed: int) -> dict:
    """The figures of a checkpoint; heads and loops on the same prompts, spread over all held-out files."""
    ids = [tok.encode(p["text"], add_special_tokens=False) for p in streams["prompts"][:MEASURED_PROMPTS]]
    return {
        "heldout_loss_nats_per_token": evaluate.heldout_loss(model, streams["heldout"]),
        "heldout_head_agreement": evaluate.agreement(model, streams["heldout"]),
        "greedy": evaluate.speculation(model, ids, NEW_TOKENS, 0.0, seed),
        "temperature_0.8": evaluate.speculation(model, ids, NEW_TOKENS, 0.8, seed),
    }


def report(model: NanoStep, before: NanoStep | None, plan: Plan, log: loop.Log, streams: dict, tok) -> dict:
    """What training_report.json holds; `before` is an earlier checkpoint measured in the same way."""
    true_text = streams["heldout"][:, : 5 * NEW_TOKENS].reshape(-1, NEW_TOKENS).tolist()
    return {
        "data": {
            "source": f"CPython {platform.python_version()} standard library, *.py without tests and tables",
            "split": f"held out: sha256(path) % 100 < {plan.heldout_percent}",
            **{key: streams[key] for key in ("train_files", "train_bytes", "heldout_files")},
            "train_tokens": len(streams["code"]),
            "chat_tokens": len(streams["chat"]),
            "synthetic_chats": plan.chat_examples,
        },
        "plan": dataclasses.asdict(plan),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_tokens": log.tokens,
        "training_cpu_seconds": round(log.seconds),
        **measure(model, streams, tok, plan.seed),
        "heldout_text_repeated_8gram_share": evaluate.repeated_ngrams(true_text),
        "before": before and measure(before, streams, tok, plan.seed),
        "evaluations": log.evaluations,
        "curve": log.curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--quick", action="store_true", help="a short run that only tries the pipeline")
    parser.add_argument("--before", type=Path, help="earlier checkpoint folder to measure too, for the report")
    parser.add_argument("--eager", action="store_true", help="no torch.compile: slower, needs no C++ compiler")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; one is fastest while the machine is shared"
    )
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16: faster where the CPU has AMX")
    args = parser.parse_args()
    plan, shape = (QUICK if args.quick else Plan()), Shape()
    torch.set_num_threads(args.threads)
    torch.manual_seed(plan.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    streams = prepare(plan, shape, args.out)
    mixture = data.Mixture(streams["code"], streams["chat"], plan.chat_share)
    model = NanoStep(shape)
    if not args.eager:
        loop.compile_layers(model)
    log = loop.Trainer(model, plan, mixture, streams["heldout"], args.out / "state.pt", args.bf16).run()
    checkpoint.round_to_bf16(model)
    checkpoint.save_weights(model, args.out)
    with torch.compiler.set_stance("force_eager"):  # other shapes than in training
        before = checkpoint.load_weights(shape, args.before) if args.before else None
        summary = report(model, before, plan, log, streams, tokenizer.load(args.out))
    checkpoint.write_json(args.out / "training_report.json", summary)
    print({k: v for k, v in summary.items() if k not in ("data", "plan", "evaluations", "curve")})


if __name__ == "__main__":
    main()
