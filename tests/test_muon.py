"""Muon: which weights it moves, by what, and that it leaves them alone where a gradient is not finite."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.loop import Learner
from common.muon import matrices_of, orthogonal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 144), (2, 144, 32)])
def test_steps_are_orthogonal_and_lie_along_the_gradient(shape: tuple, dtype: torch.dtype) -> None:
    n, rows, columns = shape
    rank, random = min(rows, columns), torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, size, rank, generator=random))[0] for size in (rows, columns))
    spectrum = torch.logspace(0, -2, rank)  # a hundredth of the largest counts as much as the largest
    step = orthogonal(((u * spectrum) @ v.mT).to(dtype)).float()
    along = (u.mT @ step @ v).diagonal(dim1=1, dim2=2)
    assert 0.6 < float(along.min()) and float(along.max()) < 1.25
    assert float(torch.linalg.svdvals(step).max()) < 1.25


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.norm = nn.Embedding(40, 16), nn.Conv2d(16, 32, 3), nn.GroupNorm(2, 32)
        self.linear, self.last = nn.Linear(32, 16), nn.Conv2d(32, 4, 3)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)


def learner(**settings) -> Learner:
    run = SimpleNamespace(parallel=lambda module, method, shard: module, dtype=torch.float32)
    return Learner(run, Small(), SimpleNamespace(**dict(lr=0.1, muon=0.02, warmup=1, ema_decay=0.9) | settings))


def test_which_weights_are_matrices() -> None:
    model = Small()
    found = matrices_of(model)
    assert len(found) == 2 and found[0] is model.conv.weight and found[1] is model.linear.weight
    with_muon, without = learner(), learner(muon=0.0)
    moved = {p for optimizer, _ in with_muon.optimizers.values() for g in optimizer.param_groups for p in g["params"]}
    assert moved == {p for p in with_muon.parts["model"].parameters() if p.requires_grad}
    assert "muon" not in without.parts and len(without.parts["optimizer"].param_groups[0]["params"]) == len(moved)


@pytest.mark.parametrize("bad", [False, True])
def test_a_step(bad: bool) -> None:
    """Every matrix moves by the rate; with one gradient that is not finite none moves, and the next step is whole."""
    random = torch.Generator().manual_seed(1)
    told = learner()
    all_before = [p.detach().clone() for p in told.parts["model"].parameters()]
    linear, before = told.parts["model"].linear.weight, told.parts["model"].linear.weight.clone()

    def step(spoil: bool) -> None:
        for p in told.parts["model"].parameters():
            p.grad = torch.randn(p.shape, generator=random) if p.requires_grad else None
        if spoil:
            linear.grad[0, 0] = torch.inf
        told.step(10)

    if bad:
        step(spoil=True)
        assert all(torch.equal(p, was) for p, was in zip(told.parts["model"].parameters(), all_before, strict=True))
    step(spoil=False)
    moved = torch.linalg.svdvals((linear - before).detach()) / 0.02
    assert 0.6 < float(moved.min()) and float(moved.max()) < 1.25
    assert all(torch.isfinite(p).all() for p in told.parts["model"].parameters())


def test_its_state_can_be_saved_and_loaded() -> None:
    one, other = learner(), learner()
    for p in one.parts["model"].parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    one.step(0)
    other.parts["muon"].load_state_dict(one.parts["muon"].state_dict())
    kept, loaded = (list(x.parts["muon"].state.values()) for x in (one, other))
    assert len(kept) == 2 and all(torch.equal(a["momentum"], b["momentum"]) for a, b in zip(kept, loaded, strict=True))


def test_a_matrix_without_a_gradient_goes_on_by_its_momentum() -> None:
    told = learner()
    conv, linear = told.parts["model"].conv.weight, told.parts["model"].linear.weight
    for used in (conv, linear, conv):  # of two shapes: either may be missing in a step
        before = linear.detach().clone()
        used.grad = torch.ones_like(used)
        told.step(10)
    assert torch.isfinite(conv).all() and torch.isfinite(linear).all() and not torch.equal(before, linear)
