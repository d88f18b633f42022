"""The training loop: stages of the backbone, then the distillation of the MTP layers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scripts.nano.checkpoint import round_to_bf16
from scripts.nano.config import Plan, Stage
from scripts.nano.data import Mixture
from scripts.nano.evaluate import agreement, heldout_loss
from scripts.nano.generate import generate
from scripts.nano.losses import EXTRA, head_losses, joint_loss, text_loss, unloop_loss
from scripts.nano.model import MoE, NanoStep
from scripts.nano.optim import Optimiser

REPORT_EVERY, EVALUATE_EVERY, SAVE_EVERY = 25, 300, 100


@dataclass
class Log:
    """Curves for training_report.json."""

    curve: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0  # of CPU: the machine may be shared

    def train(self, stage: str, step: int, losses: list[float]) -> None:
        self.curve.append({"stage": stage, "step": step, "losses": [round(x, 4) for x in losses]})
        speed = self.tokens / self.seconds
        print(f"{stage} {step}: {self.curve[-1]['losses']} {self.tokens} tokens, {speed:.0f}/s", flush=True)

    def evaluate(self, stage: str, step: int, model: NanoStep, rows: Tensor) -> None:
        model.eval()
        with torch.compiler.set_stance("force_eager"):  # other shapes than in training: not worth compiling
            entry = {"stage": stage, "step": step, "heldout_loss": round(heldout_loss(model, rows), 4)}
            entry["agreement"] = [round(x, 4) for x in agreement(model, rows)]
        model.train()
        self.evaluations.append(entry)
        print(entry, flush=True)


def compile_layers(model: NanoStep) -> None:
    """Compiles each layer in place for training: about twice the tokens a second on a CPU. Torch counts the layers
    as recompilations of one function, each anew for another shape of batch, and would give up after eight."""
    torch._dynamo.config.recompile_limit = 8 * len(model.model.layers)
    for layer in model.model.layers:
        layer.compile(dynamic=False)


@torch.no_grad()
def balance(model: NanoStep, rate: float) -> None:
    """Auxiliary-loss-free balancing (DeepSeek-V3): the choosing bias of an expert rises while it is chosen
    less than the mean, and falls while it is chosen more."""
    for layer in (m for m in model.modules() if isinstance(m, MoE)):
        layer.router_bias += rate * torch.sign(layer.load.mean() - layer.load)
        layer.load.zero_()


def learning_rate(stage: Stage, step: int, warmup: int) -> float:
    first, last = stage.lr
    return min(1.0, (step + 1) / max(warmup, 1)) * (first + (last - first) * step / stage.steps)


def build_optimiser(model: NanoStep, plan: Plan, heads: bool) -> Optimiser:
    """Over the MTP layers alone (`heads`) or over all; balance() moves the router bias, never a gradient."""
    first_mtp = len(model.backbone)
    is_mtp = lambda n: n.startswith("model.layers.") and int(n.split(".")[2]) >= first_mtp
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("router_bias") and (is_mtp(name) or not heads))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return Optimiser(named, plan.muon_lr, plan.adam_lr)


class Trainer:
    """Runs the stages in order and keeps its state in one file, from which a later call goes on.

    Batches are drawn with a generator seeded by (stage, step), so a resumed run sees the same ones."""

    def __init__(self, model: NanoStep, plan: Plan, mixture: Mixture, heldout: Tensor, path: Path, bf16: bool):
        self.model, self.plan, self.mixture, self.heldout, self.path = model, plan, mixture, heldout, path
        self.log, self.stage, self.step = Log(), 0, 0
        self.bf16 = bf16
        self.own: Tensor | None = None  # text the model wrote itself [N, length + 4], in "distill" with true text
        self.hidden: Tensor | None = None  # in "distill" the frozen backbone's state on `own` [N, length, D]
        saved = torch.load(path, weights_only=False) if path.exists() else None
        if saved:
            self.stage, self.step, self.own = saved["stage"], saved["step"], saved["own"]
            self.log = Log(saved["curve"], saved["evaluations"], saved["tokens"], saved["seconds"])
            model.load_state_dict(saved["model"])
        self.optimiser = build_optimiser(model, plan, self.current.kind == "distill")
        if saved:
            self.optimiser.load_state_dict(saved["optimiser"])

    @property
    def current(self) -> Stage:
        return self.plan.stages[min(self.stage, len(self.plan.stages) - 1)]

    def save(self, path: Path) -> None:
        log, partial = self.log, path.with_suffix(".partial")
        curves = {"curve": log.curve, "evaluations": log.evaluations, "tokens": log.tokens, "seconds": log.seconds}
        where = {"stage": self.stage, "step": self.step, "own": self.own}
        torch.save(
            where | curves | {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}, partial
        )
        partial.replace(path)

    def run(self) -> Log:
        while self.stage < len(self.plan.stages):
            self.run_stage(self.current)
            self.save(self.path.with_name(f"{self.current.name}.pt"))  # where a changed plan can go on
            self.stage, self.step = self.stage + 1, 0
            self.save(self.path)
        return self.log

    def run_stage(self, stage: Stage) -> None:
        if stage.kind == "distill":
            self.start_distillation(stage)
        self.model.train()
        while self.step < stage.steps:
            losses = self.train_step(stage)
            self.step += 1
            if self.step % REPORT_EVERY == 0:
                self.log.train(stage.name, self.step, [float(x.detach()) for x in losses])
            if self.step % EVALUATE_EVERY == 0 or self.step == stage.steps:
                self.log.evaluate(stage.name, self.step, self.model, self.heldout)
            if self.step % SAVE_EVERY == 0:
                self.save(self.path)
        self.model.eval()

    def start_distillation(self, stage: Stage) -> None:
        """Writes the text and the backbone's states that the heads learn from."""
        if self.step == 0:
            round_to_bf16(self.model)  # the heads learn the backbone that will be served
            self.own = distillation_text(self.model, self.mixture, self.plan, stage.length + EXTRA)
            self.optimiser = build_optimiser(self.model, self.plan, heads=True)
            self.save(self.path)
        self.hidden = hidden_states(self.model, self.own[:, : stage.length])

    def train_step(self, stage: Stage) -> list[Tensor]:
        started = time.process_time()
        generator = torch.Generator().manual_seed(self.plan.seed + self.stage * 1_000_000 + self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            losses = self.losses(stage, generator)
        sum(losses).backward()
        warmup = self.plan.warmup if self.stage == 0 or stage.kind == "distill" else 0
        self.optimiser.step(learning_rate(stage, self.step, warmup))
        if stage.kind != "distill":
            balance(self.model, self.plan.bias_rate)
        self.log.tokens += stage.rows * stage.length
        self.log.seconds += time.process_time() - started
        return losses

    def losses(self, stage: Stage, generator: torch.Generator) -> list[Tensor]:
        """The terms of one batch's loss, by the kind of the stage."""
        length = stage.length + EXTRA
        if stage.kind == "text":
            return [text_loss(self.model, self.mixture.rows(stage.rows, length, generator))]
        if stage.kind == "joint":
            text, *heads = joint_loss(self.model, self.mixture.rows(stage.rows, length, generator))
            return [text, *(self.plan.joint_weight * head for head in heads)]
        if stage.kind == "unloop":
            if self.step % self.plan.loop_refresh == 0 or self.own is None:
                self.own = greedy_text(self.model, self.mixture, self.plan, length, self.step)
            count = round(stage.rows * self.plan.loop_share)
            own = self.own[torch.randint(len(self.own), (count,), generator=generator)]
            true = self.mixture.rows(stage.rows - len(own), length, generator)
            likelihood, unlikelihood = unloop_loss(self.model, own, true, self.plan.loop_ngram)
            return [likelihood, self.plan.loop_weight * unlikelihood]
        chosen = torch.randint(len(self.own), (stage.rows,), generator=generator)
        return head_losses(self.model, self.own[chosen], self.hidden[chosen])


def greedy_text(model: NanoStep, mixture: Mixture, plan: Plan, length: int, step: int) -> Tensor:
    """What the model writes greedily after crops of the corpus, [loop_rows, length]."""
    prompts = mixture.rows(plan.loop_rows, plan.own_prompt, torch.Generator().manual_seed(plan.seed + 500 + step))
    model.eval()
    rows = generate(model, prompts.tolist(), length, 0.0, plan.seed)
    model.train()
    return rows


def distillation_text(model: NanoStep, mixture: Mixture, plan: Plan, length: int) -> Tensor:
    """Text the backbone writes itself at each temperature, and true text: [N, length]."""
    generator, model = torch.Generator().manual_seed(plan.seed + 100), model.eval()
    texts = [mixture.rows(plan.true_rows, length, generator)]
    for temperature in plan.own_temperatures:
        prompts = mixture.rows(plan.own_rows, plan.own_prompt, generator)
        texts.append(generate(model, prompts.tolist(), length, temperature, plan.seed))
    return torch.cat(texts)


@torch.no_grad()
def hidden_states(model: NanoStep, tokens: Tensor) -> Tensor:
    """tokens [N, T] -> last hidden states [N, T, D] of the backbone, computed eagerly: compiling it once more
    takes longer than it saves."""
    with torch.compiler.set_stance("force_eager"):
        return torch.cat([model.eval().hidden(part) for part in tokens.split(16)])
