"""Exercises of lesson 1: what the network is asked for, and how a sample comes out of it. 40 minutes.

Read first: the docstring of 01_toy_alignment.py, and Sec. 2 of the paper. Explains the cells "Loss and training" and
"Sample", and common/diffusion.py. At every diffusion time x_tau = alpha x + sigma eps with alpha^2 + sigma^2 = 1.
"""

import torch


def v_target(x: torch.Tensor, eps: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What a v-prediction network is asked for: v = alpha eps - sigma x. Shapes are b t or broadcast to it. 5 min"""
    raise NotImplementedError


def clean_and_noise(v: torch.Tensor, x_tau: torch.Tensor, alpha: torch.Tensor,
                    sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse: x and eps, of v and x_tau. Solve the two equations (they are a rotation). 10 min"""
    raise NotImplementedError


def ddim_step(clean: torch.Tensor, eps: torch.Tensor, now: tuple[torch.Tensor, torch.Tensor],
              after: tuple[torch.Tensor, torch.Tensor], eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One DDIM step, from (alpha, sigma) = `now` to the less noisy `after`: 15 min

        fresh = eta sigma' / sigma sqrt(1 - (alpha / alpha')^2)
        x'    = alpha' clean + sqrt(sigma'^2 - fresh^2) eps   (+ fresh times new noise, which the caller adds)

    Primes are of `after`. Returns x' without the new noise, and fresh. eta 0 is deterministic, 1 ancestral.
    """
    raise NotImplementedError


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance: beyond the conditional prediction, away from the unconditional one. Scale 0 gives the
    unconditional, scale 1 the conditional one. 5 min"""
    raise NotImplementedError
