"""The diffusion process of Sec. 2: variance preserving, 1000 steps, eps- or v-prediction, DDIM sampling.

`tau` is diffusion time, an integer in 0..999 (frames are `t`). At every tau, alpha^2 + sigma^2 = 1; these are the
paper's alpha_tau and sigma_tau, not the merge parameter alpha of the temporal layers.
"""

from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

Conditions = Sequence[torch.Tensor | None]


def make_betas(schedule: str, beta_start: float, beta_end: float, steps: int = 1000) -> torch.Tensor:
    """The two things called "linear". LDM's code (and so every Stable Diffusion weight) means linear in sqrt(beta);
    Ho et al., whom App. F names, mean linear in beta. Latent models here use the first, pixel models the second."""
    if schedule == "sqrt_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    raise ValueError(f"schedule {schedule!r}: use sqrt_linear or linear")


class Diffusion:
    """Schedule and parameterization of one model. Shapes are any `b ...`; tau is an int64 tensor of shape b.

    parameterization: "v" (target alpha eps - sigma x, Sec. 2) or "eps" (target eps).
    """

    def __init__(self, schedule: str, beta_start: float, beta_end: float, parameterization: str,
                 device: torch.device | str = "cpu") -> None:
        if parameterization not in ("v", "eps"):
            raise ValueError(f"parameterization {parameterization!r}: use v or eps")
        alpha_bar = torch.cumprod(1 - make_betas(schedule, beta_start, beta_end), 0)
        self.alpha = alpha_bar.sqrt().float().to(device)
        self.sigma = (1 - alpha_bar).sqrt().float().to(device)
        self.parameterization, self.steps, self.device = parameterization, len(alpha_bar), device

    def levels(self, tau: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha_tau and sigma_tau, shaped to multiply `like` (b ...)."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        return self.alpha[tau].view(shape), self.sigma[tau].view(shape)

    def random_tau(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Uniform tau, as the paper samples it."""
        return torch.randint(0, self.steps, (count,), generator=generator).to(self.device)

    def diffuse(self, x: torch.Tensor, eps: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        alpha, sigma = self.levels(tau, x)
        return alpha * x + sigma * eps  # x_tau of Eq. (1)

    def target(self, x: torch.Tensor, eps: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """y of Eq. (1): what the network is asked for."""
        if self.parameterization == "eps":
            return eps
        alpha, sigma = self.levels(tau, x)
        return alpha * eps - sigma * x

    def min_snr_weight(self, tau: torch.Tensor, cap: float) -> torch.Tensor:
        """Weights b of Eq. (1)'s losses by "min-SNR" (Hang et al. 2023): the error of the clean x counts by the
        signal-to-noise ratio, but by `cap` at most. In their terms eps-loss is SNR times that error, v-loss SNR + 1."""
        snr = (self.alpha[tau] / self.sigma[tau]).square()
        return snr.clamp(max=cap) / (snr if self.parameterization == "eps" else snr + 1)

    def split(self, output: torch.Tensor, x_tau: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean x and the noise eps that a network output stands for."""
        alpha, sigma = self.levels(tau, x_tau)
        if self.parameterization == "eps":
            return (x_tau - sigma * output) / alpha, output
        return alpha * x_tau - sigma * output, sigma * x_tau + alpha * output

    def ddim_times(self, steps: int, power: float = 1.0) -> torch.Tensor:
        """Exactly `steps` distinct diffusion times, from 999 (pure noise, where sampling begins) downwards.

        Evenly spaced with power 1, finer towards the data with more (only for few steps: times must stay distinct).

        LDM's range(0, 1000, 1000 // n) + 1 gives another number of steps whenever n does not divide 1000, and begins
        below 999, where the noise it is handed is not what the model was trained on.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"DDIM steps {steps}: use 1 to {self.steps}")
        even = torch.arange(steps, 0, -1, dtype=torch.float64) / steps  # 1 down to 1 / steps
        times = ((even**power * self.steps).round() - 1).clamp(min=0).long()
        if len(times.unique()) < steps:
            raise ValueError(f"DDIM steps {steps}: too many for times spaced with power {power:g}")
        return times

    @torch.no_grad()
    def ddim(self, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, steps: int,
             eta: float, generator: torch.Generator, clamp: float | None = None, label: str = "",
             power: float = 1.0) -> torch.Tensor:
        """DDIM (Song et al.): eta 0 is deterministic, eta 1 ancestral.

        predict(x_tau, tau) gives the network's output; noise: b ...; clamp bounds the clean estimate (pixel models
        know their range); label, if given, names the progress bar.
        """
        times = self.ddim_times(steps, power).tolist()
        x = noise
        for now, after in tqdm(list(zip(times, times[1:] + [-1], strict=True)), desc=label, disable=not label or None,
                               leave=False, mininterval=1.0):
            tau = torch.full((len(x),), now, device=x.device, dtype=torch.long)
            clean, eps = self.split(predict(x, tau).float(), x, tau)
            if after < 0:
                return clean.clamp(-clamp, clamp) if clamp else clean
            if clamp:
                clean = clean.clamp(-clamp, clamp)
                eps = (x - self.alpha[now] * clean) / self.sigma[now]
            x, fresh = self.ddim_step(clean, eps, now, after, eta)
            if eta > 0:
                x = x + fresh * torch.randn(x.shape, generator=generator).to(x.device)
        return x

    def ddim_step(self, clean: torch.Tensor, eps: torch.Tensor, now: int, after: int,
                  eta: float) -> tuple[torch.Tensor, torch.Tensor]:
        """From the clean estimate and the noise at tau = `now` to x at tau = `after`, but for the noise that is drawn
        afresh; and the deviation of that (Song et al. Eqs. 12 and 16)."""
        alpha, sigma, alpha_next, sigma_next = self.alpha[now], self.sigma[now], self.alpha[after], self.sigma[after]
        fresh = eta * sigma_next / sigma * (1 - (alpha / alpha_next) ** 2).clamp(min=0).sqrt()
        return alpha_next * clean + (sigma_next**2 - fresh**2).clamp(min=0).sqrt() * eps, fresh

    @torch.no_grad()
    def loss_at(self, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor,
                eps: torch.Tensor, taus: list[int]) -> list[float]:
        """Mean squared error at each noise level with the same noise: the training loss averages this away."""
        losses = []
        for level in taus:
            tau = torch.full((len(x),), level, device=x.device, dtype=torch.long)
            output = predict(self.diffuse(x, eps, tau), tau).float()
            losses.append(float((output - self.target(x, eps, tau)).square().mean()))
        return losses


def in_common(noise: torch.Tensor, frames: int, rho: float) -> torch.Tensor:
    """Independent noise (b t) c h w to noise of which the frames of a clip have the part rho of the variance in common
    (Ge et al. 2023, "Preserve Your Own Correlation"). What a network leaves of it is then alike in all frames, and does
    not boil."""
    if not rho:
        return noise
    noise = noise.unflatten(0, (-1, frames))
    first = noise[:, :1]
    return torch.cat([first, rho**0.5 * first + (1 - rho) ** 0.5 * noise[:, 1:]], dim=1).flatten(0, 1)


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """u + s (c - u): classifier-free guidance, and with the context as condition Eq. (4), context guidance."""
    return unconditional + scale * (conditional - unconditional)


def guided(network: Callable[..., torch.Tensor], x: torch.Tensor, tau: torch.Tensor, told: Conditions,
           untold: Conditions, scale: float) -> torch.Tensor:
    """`guide` between network(x, tau, *untold) and network(x, tau, *told), which are computed as one batch.

    For one clip that takes three quarters of the time of two passes, for many clips as long. None stays None.
    """
    if scale == 1:
        return network(x, tau, *told)
    both = (None if b is None else torch.cat([a, b]) for a, b in zip(untold, told, strict=True))
    return guide(*network(torch.cat([x, x]), torch.cat([tau, tau]), *both).chunk(2), scale)
