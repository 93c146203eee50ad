"""Exercises of lesson 5: what is known, told without a leak, and guidance by it. 35 minutes.

Read first: Sec. 3.2 of the paper with Eqs. (3) and (4). Explains "Eq. (3)" and "Sampling: Eq. (4)".
"""

from collections.abc import Callable

import torch


def prediction_mask(known: torch.Tensor, frames: int) -> torch.Tensor:
    """m_S, b t of zeros and ones: of clip i the first known[i] frames are known. known: b, of 0, 1, 2. 5 min"""
    raise NotImplementedError


def masked_context(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """c_S = (m_S * z, m_S), concatenated along the channels: (b t) c h w and b t -> (b t) c+1 h w. Nothing of an
    unknown frame may get through, and the mask must be told too: a black frame and a hidden one are not the same.
    10 min"""
    raise NotImplementedError


def context_guidance(network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], z_tau: torch.Tensor,
                     c_S: torch.Tensor, scale: float) -> torch.Tensor:
    """Eq. (4): f(z) + s (f(z; c_S) - f(z)), f = network(z_tau, context). "Nothing is known" is told by a context of
    zeros, the mask included. 10 min"""
    raise NotImplementedError


def long_prediction(predict: Callable[[torch.Tensor], torch.Tensor], first: torch.Tensor, count: int) -> torch.Tensor:
    """Iteration: `count` latents, count c h w, from the first, 1 c h w. predict(known), known 1 s c h w, gives a clip
    1 t c h w that begins with what is known. S = 1 at first, then S = 2 with the last two, again and again; what is
    known is not written twice. 10 min"""
    raise NotImplementedError
