"""Lesson 1: the exact score is exact, the sampler ends at the data, the numbers can tell aligned clips from others."""

from importlib import import_module

import pytest
import torch

from common.diffusion import Diffusion

toy = import_module("01_toy_alignment")
DIFFUSION = Diffusion("sqrt_linear", 0.0015, 0.0195, "v", "cpu")


def clips(count: int = 4096, seed: int = 0, frames: int = toy.FRAMES) -> torch.Tensor:
    return toy.draw_clips(count, torch.Generator().manual_seed(seed), frames)


def test_a_frame_of_a_clip_is_distributed_as_an_image() -> None:
    points = torch.linspace(-2.5, 2.5, 51)
    images = (clips(60_000, 1, frames=1) < points).float().mean(0)  # the distribution function
    for frame in clips(60_000).T:
        torch.testing.assert_close((frame[:, None] < points).float().mean(0), images, atol=0.015, rtol=0)


def test_the_numbers_separate_clips_from_shuffled_frames() -> None:
    data = clips()
    order = torch.stack([torch.randperm(len(data), generator=torch.Generator().manual_seed(i)) for i in range(6)], 1)
    whole, shuffled = toy.measure(data, clips(seed=1)), toy.measure(data.gather(0, order), clips(seed=1))
    assert whole["together"] > 0.99 and shuffled["together"] < 0.02
    assert whole["lag1_inside"] == pytest.approx(toy.CORRELATION, abs=0.02)
    assert shuffled["lag1"] == pytest.approx(0, abs=0.05)
    assert shuffled["w1"] == pytest.approx(whole["w1"])  # frames alone cannot tell them apart


def test_frozen_noise_in_a_mode_is_told_apart_from_a_smooth_clip() -> None:
    """Alignment alone is not enough: independent values in one mode share the mode but have no motion."""
    generator = torch.Generator().manual_seed(0)
    mode = torch.multinomial(toy.WEIGHTS, 4096, True, generator=generator)[:, None]
    jumpy = toy.MEANS[mode] + toy.STDS[mode] * torch.randn(4096, toy.FRAMES, generator=generator)
    numbers = toy.measure(jumpy, clips())
    assert numbers["together"] > 0.98 and abs(numbers["lag1_inside"]) < 0.05


def test_the_exact_v_minimises_the_loss() -> None:
    """Against the loss of Eq. (2) on samples: no fixed perturbation of the closed form does better."""
    x, draw, predict = clips(20_000), torch.Generator().manual_seed(5), toy.exact_v(DIFFUSION)
    for time in (20, 300, 700):
        eps, tau = torch.randn(x.shape, generator=draw), torch.full((len(x),), time)
        x_tau, target = DIFFUSION.diffuse(x, eps, tau), DIFFUSION.target(x, eps, tau)
        v = predict(x_tau, tau)
        best = (v - target).square().mean()
        for other in (1.05 * v, 0.95 * v, v + 0.05, v - 0.05, v.roll(1, 1)):
            assert (other - target).square().mean() > best


def test_sampling_with_the_exact_score_gives_the_data() -> None:
    noise = torch.randn(4096, toy.FRAMES, generator=torch.Generator().manual_seed(0))
    end, path = toy.sample(toy.exact_v(DIFFUSION), DIFFUSION, noise, 150, torch.Generator().manual_seed(1))
    numbers = toy.measure(end, clips())
    assert numbers["together"] > 0.98 and numbers["lag1_inside"] > 0.8 and numbers["w1"] < 0.15
    assert torch.equal(path[0], noise) and torch.equal(path[-1], end)


def test_temporal_layers_start_as_the_image_model_and_reach_every_frame() -> None:
    torch.manual_seed(0)
    model, x, tau = toy.Denoiser(16, 2), torch.randn(3, 6), torch.tensor([10, 500, 900])
    with torch.no_grad():
        assert torch.equal(model(x, tau), model(x, tau, temporal=False))
        for layer in model.time_stack:
            torch.nn.init.normal_(layer.out.weight, generator=torch.Generator().manual_seed(1))
        moved = x.clone()
        moved[:, 3] += 1
        assert ((model(moved, tau) - model(x, tau)).abs() > 1e-6).all()  # frame 3 reaches each of the six
        before, after = model(x, tau, temporal=False), model(moved, tau, temporal=False)
        assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3], after[:, 3])
