"""Muon, an optimizer for few steps: it moves weight matrices by orthogonal ones (Jordan et al. 2024; not the paper's).

A plain step follows the few large singular values of a gradient, and forgets the many small ones. Muon sets them all to
about 1, so that every direction in which batches agree is learnt at once. Convolutions are matrices as well, with a row
for every output channel. Biases, gains, embeddings and what is narrower than 16 (the last convolution) stay AdamW's. In
minutes on two cores a half to a fifth of the steps do (docs/tried.md), so the cpu presets have it; those of the paper
do not.
"""

from collections import defaultdict

import torch
from torch import nn

NARROW = 16


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """The trained weights that are matrices of at least 16 x 16."""
    tables = {p for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    return [p for p in module.parameters() if p.requires_grad and p not in tables and p.dim() > 1
            and len(p) >= NARROW and p[0].numel() >= NARROW]


class Muon(torch.optim.Optimizer):
    """lr: how far a step moves a square matrix's singular values; dtype: of the products that make steps orthogonal."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, dtype: torch.dtype, momentum: float = 0.95,
                 weight_decay: float = 0.01) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Leaves all as it is where `found_inf` is 1, see clip_and_warm_up."""
        good = 1 - self.found_inf
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape go through all of it together
            for p in group["params"]:
                alike[p.shape].append(p)
            for (rows, *_), members in alike.items():
                # columns in the order of channels-last memory, which is as good as any other and needs no copy
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
                gradient = torch.stack([g.movedim(1, -1).flatten(1) for g in gradients])  # n r c
                gradient = torch.where(good > 0, gradient, 0)
                state = self.state[members[0]]
                average = state.setdefault("momentum", torch.zeros_like(gradient))
                average.lerp_(gradient, (1 - group["momentum"]) * good)
                step = orthogonal(gradient.lerp_(average, group["momentum"]).to(self.dtype)).float()  # Nesterov's
                step *= good * (group["lr"] * max(1.0, rows / step.shape[2]) ** 0.5)
                moves = [move.view(rows, *p.shape[2:], p.shape[1]).movedim(-1, 1)
                         for p, move in zip(members, step, strict=True)]
                torch._foreach_mul_(members, 1 - good * (group["lr"] * group["weight_decay"]))
                torch._foreach_sub_(members, moves)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """n r c: of each x = U S V^T, about U V^T. Five times the same polynomial, a x + b x^3 + c x^5, which changes the
    singular values alone and brings them to between 0.7 and 1.2, by products only."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x
