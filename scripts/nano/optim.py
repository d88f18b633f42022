"""Muon for matrices and Adam for the rest, with one learning-rate multiplier for both.

Muon after Jordan et al., https://kellerjordan.github.io/posts/muon/: the momentum of a matrix is replaced by
the nearest orthogonal matrix, found by five Newton-Schulz steps. Matrices of equal shape go as one batch.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """g [N, rows, cols] -> about U V^T of each matrix."""
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[-2] > g.shape[-1]
    x = g.transpose(-1, -2) if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if tall else x


class Muon(torch.optim.Optimizer):
    """Takes 2-D and 3-D (stacked) matrices only."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in (p for p in group["params"] if p.grad is not None):
                by_shape[p.shape[-2:]].append(p)
            for matrices in by_shape.values():
                self._step(matrices, group["lr"], group["momentum"])

    def _step(self, matrices: list[Tensor], lr: float, momentum: float) -> None:
        stack = lambda ts: torch.cat([t.reshape(-1, *t.shape[-2:]) for t in ts])
        for p in matrices:
            velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
            velocity.lerp_(p.grad, 1 - momentum)
        grads, velocities = stack([p.grad for p in matrices]), stack([self.state[p]["velocity"] for p in matrices])
        update = orthogonalise(grads.lerp(velocities, momentum))  # Nesterov
        rows, cols = update.shape[-2:]
        pieces = update.split([p.numel() // (rows * cols) for p in matrices])
        for p, piece in zip(matrices, pieces, strict=True):
            p.add_(piece.reshape(p.shape), alpha=-lr * max(1.0, rows / cols) ** 0.5)


class Optimiser:
    """Muon and Adam behind one step(scale)."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], muon_lr: float, adam_lr: float):
        is_matrix = lambda n, p: p.ndim >= 2 and not n.startswith(("model.embed", "lm_head")) and min(p.shape[-2:]) > 8
        matrices = [p for n, p in named if is_matrix(n, p)]
        rest = [p for n, p in named if not is_matrix(n, p)]
        self.parts = []
        if matrices:
            self.parts.append((Muon(matrices, muon_lr), muon_lr))
        if rest:
            self.parts.append((torch.optim.Adam(rest, adam_lr, betas=(0.9, 0.95), fused=True), adam_lr))

    def step(self, scale: float) -> None:
        for optimiser, base in self.parts:
            for group in optimiser.param_groups:
                group["lr"] = base * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [optimiser.state_dict() for optimiser, _ in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for (optimiser, _), state in zip(self.parts, states, strict=True):
            optimiser.load_state_dict(state)
