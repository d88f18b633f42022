"""The training loop: stages of joint training, then the distillation of the MTP layers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nano.checkpoint import round_to_bf16
from nano.config import Plan, Stage
from nano.data import Mixture
from nano.evaluate import agreement, heldout_loss
from nano.generate import generate_many
from nano.model import MoE, NanoStep
from nano.optim import Optimiser

EXTRA = 4  # a row holds T + 4 tokens: the last MTP layer's label lies four past its position
REPORT_EVERY, EVALUATE_EVERY, SAVE_EVERY = 25, 300, 100


@dataclass
class Log:
    """Curves for training_report.json."""

    curve: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

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
    """Compiles each layer in place for training: about twice the tokens a second on a CPU."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def backbone_loss(model: NanoStep, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows [B, T + 4] -> loss for token t + 1 in nats, last hidden [B, T, D], logits [B, T, V]."""
    t = rows.shape[1] - EXTRA
    hidden = model.hidden(rows[:, :t])
    logits = model.logits(hidden)
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1 : t + 1].flatten()), hidden, logits


def head_losses(model: NanoStep, rows: Tensor, hidden: Tensor, logits: Tensor) -> list[Tensor]:
    """Cross-entropy of each head against the backbone's own distribution for the same token: what a head is for
    is to guess the backbone, and the full distribution teaches more than one true token."""
    teacher, losses = logits.detach().softmax(-1), []
    for i, draft in enumerate(model.draft_logits(rows, hidden)):
        target = teacher[:, 1 + i :]  # the backbone at t + 1 + i names token t + 2 + i
        losses.append(F.cross_entropy(draft[:, : target.shape[1]].flatten(0, 1), target.flatten(0, 1)))
    return losses


@torch.no_grad()
def balance(model: NanoStep, rate: float) -> None:
    """Auxiliary-loss-free balancing (DeepSeek-V3): the choosing bias of an expert rises while it is chosen
    less than the mean, and falls while it is chosen more."""
    for layer in (m for m in model.modules() if isinstance(m, MoE)):
        layer.router_bias += rate * torch.sign(layer.load.mean() - layer.load)
        layer.load.zero_()


def learning_rate(stage: Stage, step: int, warmup: int) -> float:
    first, last = stage.lr
    return min(1.0, (step + 1) / warmup) * (first + (last - first) * step / stage.steps)


def build_optimiser(model: NanoStep, plan: Plan, frozen: bool) -> Optimiser:
    """Over everything, or over the MTP layers alone; the router bias is moved by balance(), never by a gradient."""
    first_mtp = len(model.backbone)
    is_mtp = lambda n: n.startswith("model.layers.") and int(n.split(".")[2]) >= first_mtp
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("router_bias") and (is_mtp(name) or not frozen))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return Optimiser(named, plan.muon_lr, plan.adam_lr)


class Trainer:
    """Runs the stages in order and keeps its state in one file, from which a later call goes on.

    Batches are drawn with a generator seeded by (stage, step), so a resumed run sees the same ones. A model that
    has been through earlier stages starts at `stage` with their log."""

    def __init__(
        self, model: NanoStep, plan: Plan, mixture: Mixture, heldout: Tensor, path: Path, stage: int = 0, log: Log | None = None
    ):
        self.model, self.plan, self.mixture, self.heldout, self.path = model, plan, mixture, heldout, path
        self.log, self.own, self.stage, self.step = log or Log(), None, stage, 0
        saved = torch.load(path, weights_only=False) if path.exists() else None
        if saved:
            self.stage, self.step, self.own = saved["stage"], saved["step"], saved["own"]
            self.log = Log(saved["curve"], saved["evaluations"], saved["tokens"], saved["seconds"])
            model.load_state_dict(saved["model"])
        self.optimiser = build_optimiser(model, plan, self.current.frozen)
        if saved:
            self.optimiser.load_state_dict(saved["optimiser"])

    @property
    def current(self) -> Stage:
        return self.plan.stages[min(self.stage, len(self.plan.stages) - 1)]

    def save(self) -> None:
        log, partial = self.log, self.path.with_suffix(".partial")
        curves = {"curve": log.curve, "evaluations": log.evaluations, "tokens": log.tokens, "seconds": log.seconds}
        where = {"stage": self.stage, "step": self.step, "own": self.own}
        torch.save(where | curves | {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}, partial)
        partial.replace(self.path)

    def run(self) -> Log:
        while self.stage < len(self.plan.stages):
            self.run_stage(self.current)
            self.stage, self.step = self.stage + 1, 0
            self.save()
        return self.log

    def run_stage(self, stage: Stage) -> None:
        if stage.frozen and self.own is None:
            round_to_bf16(self.model)  # the heads learn the backbone that will be served
            self.own = own_text(self.model, self.mixture, self.plan)
            self.optimiser = build_optimiser(self.model, self.plan, frozen=True)
            self.save()
        self.model.train()
        while self.step < stage.steps:
            losses = self.train_step(stage)
            self.step += 1
            if self.step % REPORT_EVERY == 0:
                self.log.train(stage.name, self.step, [float(x.detach()) for x in losses])
            if self.step % EVALUATE_EVERY == 0 or self.step == stage.steps:
                self.log.evaluate(stage.name, self.step, self.model, self.heldout)
            if self.step % SAVE_EVERY == 0:
                self.save()
        self.model.eval()

    def train_step(self, stage: Stage) -> list[Tensor]:
        started = time.monotonic()
        generator = torch.Generator().manual_seed(self.plan.seed + self.stage * 1_000_000 + self.step)
        rows = self.draw(stage, generator)
        losses = self.losses(stage, rows)
        (losses[0] + stage.mtp_weight * sum(losses[1:])).backward()
        warmup = self.plan.warmup if self.stage == 0 or stage.frozen else 1
        self.optimiser.step(learning_rate(stage, self.step, warmup))
        if not stage.frozen:
            balance(self.model, self.plan.bias_rate)
        self.log.tokens += stage.rows * stage.length
        self.log.seconds += time.monotonic() - started
        return losses

    def losses(self, stage: Stage, rows: Tensor) -> list[Tensor]:
        """Backbone first, then the heads unless they have no weight in this stage."""
        if stage.frozen:
            # Forward only: eager, because compiling it once more takes longer than it saves.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                first, hidden, logits = backbone_loss(self.model, rows)
        else:
            first, hidden, logits = backbone_loss(self.model, rows)
        return [first, *(head_losses(self.model, rows, hidden, logits) if stage.mtp_weight else [])]

    def draw(self, stage: Stage, generator: torch.Generator) -> Tensor:
        """[rows, length + 4]; for the distillation 3/8 sampled, 1/4 greedy and 3/8 true text."""
        length = stage.length + EXTRA
        if not stage.frozen:
            return self.mixture.rows(stage.rows, length, generator)
        sampled, greedy = stage.rows * 3 // 8, stage.rows // 4
        some = lambda rows, n: rows[torch.randint(len(rows), (n,), generator=generator)][:, :length]
        true = self.mixture.rows(stage.rows - sampled - greedy, length, generator)
        return torch.cat((some(self.own[0], sampled), some(self.own[1], greedy), true))


def own_text(model: NanoStep, mixture: Mixture, plan: Plan) -> list[Tensor]:
    """Text the backbone writes itself, [N, own_length + 4]: sampled at temperature 0.8, and greedy."""
    generator, model = torch.Generator().manual_seed(plan.seed + 100), model.eval()
    length, texts = plan.own_length + EXTRA, []
    for count, temperature in ((plan.own_sampled, 0.8), (plan.own_greedy, 0.0)):
        prompts = mixture.rows(count, plan.own_prompt, generator)
        texts.append(generate_many(model, prompts, length, temperature, plan.seed))
    return texts
