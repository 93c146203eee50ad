"""The diffusion process: schedules, parameterizations, and DDIM against a closed form."""

import pytest
import torch

from common.diffusion import Diffusion, guide, guided, make_betas


@pytest.mark.parametrize(
    ("schedule", "betas", "sigmas", "last_alpha"),
    [  # sigma at tau = 30, 150, 250 and alpha at the end, for the paper's betas in both meanings of "linear"
        ("sqrt_linear", (0.0015, 0.0195), (0.221, 0.528, 0.701), 0.012),
        ("linear", (0.0015, 0.0195), (0.231, 0.592, 0.782), 0.005),
        ("sqrt_linear", (0.00085, 0.012), (0.168, 0.415, 0.571), 0.068),
        ("linear", (1e-4, 0.02), (0.111, 0.463, 0.692), 0.006),
        ("sqrt_linear", (0.0003, 0.022), (0.107, 0.331, 0.515), 0.015),
    ],
)
def test_noise_levels(schedule: str, betas: tuple, sigmas: tuple, last_alpha: float) -> None:
    diffusion = Diffusion(schedule, *betas, "v")
    for tau, sigma in zip((30, 150, 250), sigmas, strict=True):
        assert float(diffusion.sigma[tau]) == pytest.approx(sigma, abs=0.003)
    assert float(diffusion.alpha[-1]) == pytest.approx(last_alpha, abs=0.001)
    assert torch.allclose(diffusion.alpha**2 + diffusion.sigma**2, torch.ones(1000))


def test_linear_has_two_meanings() -> None:
    assert torch.allclose(make_betas("linear", 0.1, 0.2, 3), torch.tensor([0.1, 0.15, 0.2], dtype=torch.float64))
    middle = ((0.1**0.5 + 0.2**0.5) / 2) ** 2
    assert float(make_betas("sqrt_linear", 0.1, 0.2, 3)[1]) == pytest.approx(middle)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_target_and_split_are_inverse(parameterization: str) -> None:
    diffusion = Diffusion("sqrt_linear", 0.0015, 0.0195, parameterization)
    x, eps, tau = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.tensor([5, 400, 900])
    clean, noise = diffusion.split(diffusion.target(x, eps, tau), diffusion.diffuse(x, eps, tau), tau)
    torch.testing.assert_close(clean, x, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(noise, eps, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("steps", [1, 7, 30, 50, 250, 300, 999, 1000])
def test_exactly_the_steps_asked_for(steps: int) -> None:
    times = Diffusion("linear", 1e-4, 0.02, "v").ddim_times(steps).tolist()
    assert len(set(times)) == steps and times[0] == 999 and times == sorted(times, reverse=True) and times[-1] >= 0


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps(steps: int) -> None:
    with pytest.raises(ValueError, match="1 to 1000"):
        Diffusion("linear", 1e-4, 0.02, "v").ddim_times(steps)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_reaches_a_gaussian(parameterization: str, eta: float) -> None:
    """Data N(mean, s^2) have an exact denoiser in closed form; sampling with it must give that Gaussian back."""
    diffusion, mean, s = Diffusion("sqrt_linear", 0.0015, 0.0195, parameterization), 0.7, 0.4

    def exact(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        alpha, sigma = diffusion.levels(tau, x)
        clean = mean + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x - alpha * mean)
        return diffusion.target(clean, (x - alpha * clean) / sigma, tau)

    generator = torch.Generator().manual_seed(0)
    # few steps narrow the distribution, with any eta: 100 leave 0.374 of 0.4
    x = diffusion.ddim(exact, torch.randn(20_000, 1, generator=generator), 1000, eta, generator)
    assert float(x.mean()) == pytest.approx(mean, abs=0.02)
    assert float(x.std()) == pytest.approx(s, abs=0.02)


def test_ddim_without_noise_follows_the_closed_form_exactly() -> None:
    """For a point mass the path is alpha mean + sigma eps with the same eps throughout, whatever the steps."""
    diffusion, mean = Diffusion("sqrt_linear", 0.0015, 0.0195, "v"), 0.7
    seen = []

    def exact(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        alpha, sigma = diffusion.levels(tau, x)
        seen.append((x - alpha * mean) / sigma)
        return diffusion.target(torch.full_like(x, mean), seen[-1], tau)

    noise = torch.randn(5, 3, dtype=torch.float64).float()
    end = diffusion.ddim(exact, noise, 13, 0.0, torch.Generator())
    torch.testing.assert_close(end, torch.full_like(end, mean), atol=1e-5, rtol=1e-5)
    for eps in seen[1:]:
        torch.testing.assert_close(eps, seen[0], atol=1e-4, rtol=1e-4)


def test_guidance_is_equation_4() -> None:
    free, told = torch.tensor([1.0]), torch.tensor([3.0])
    assert (
        float(guide(free, told, 0.0)) == 1 and float(guide(free, told, 1.0)) == 3 and float(guide(free, told, 2.0)) == 5
    )


def test_guidance_in_one_batch_is_guidance_in_two_passes() -> None:
    x, tau = torch.randn(6, 4, 2, 2), torch.tensor([3, 400])
    told, untold = [torch.randn(2, 3), None], [torch.randn(2, 3), None]
    calls = []

    def network(x: torch.Tensor, tau: torch.Tensor, text: torch.Tensor, label: None) -> torch.Tensor:
        calls.append(len(x))
        by_clip = x.unflatten(0, (len(tau), -1)) * text.sum(1).view(-1, 1, 1, 1, 1) + tau.view(-1, 1, 1, 1, 1)
        return by_clip.flatten(0, 1)

    expected = guide(network(x, tau, *untold), network(x, tau, *told), 2.5)
    torch.testing.assert_close(guided(network, x, tau, told, untold, 2.5), expected)
    assert torch.equal(guided(network, x, tau, told, untold, 1), network(x, tau, *told))
    assert calls == [6, 6, 12, 6, 6]  # nothing is computed for the untold where the scale is 1


@pytest.mark.parametrize("parameterization", ["v", "eps"])
def test_min_snr_counts_the_error_of_x_by_the_ratio_up_to_a_cap(parameterization: str) -> None:
    diffusion = Diffusion("sqrt_linear", 0.0015, 0.0195, parameterization)
    draw, tau = torch.Generator().manual_seed(0), torch.tensor([20, 120, 300, 700, 990])
    x, eps, output = (torch.randn(5, 2, 3, dtype=torch.float64, generator=draw) for _ in range(3))
    x_tau = diffusion.diffuse(x, eps, tau)
    loss = (output - diffusion.target(x, eps, tau)).square().mean(dim=(1, 2))
    wrong = (diffusion.split(output, x_tau, tau)[0] - x).square().mean(dim=(1, 2))
    ratio = (diffusion.alpha[tau] / diffusion.sigma[tau]).square()
    assert ratio[0] > 5 > ratio[-1]
    assert torch.allclose(diffusion.min_snr_weight(tau, 5.0) * loss, ratio.clamp(max=5) * wrong, rtol=1e-4)
