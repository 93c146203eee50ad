"""Exercises of lesson 7: patches of clips, and noise that the upsampler is told of. 25 minutes.

Read first: Sec. 3.4 of the paper. Explains `patches` and `upsampling_loss`.
"""

import torch


def patches(video: torch.Tensor, places: list[tuple[int, int]], side: int) -> torch.Tensor:
    """One square patch of each clip, at its (top, left): b t 3 H W -> b t 3 side side. All frames of a clip are cut at
    the same place; were they not, time would hold nothing to learn. 10 min"""
    raise NotImplementedError


def augmented(small: torch.Tensor, eps: torch.Tensor, levels: torch.Tensor, alpha: torch.Tensor,
              sigma: torch.Tensor) -> torch.Tensor:
    """Noise augmentation: small frames (b t 3 h w) diffused to a noise level of each clip. levels: b, diffusion times;
    alpha, sigma: tables of 1000 levels. One level for all frames of a clip, noise of each frame its own. 15 min"""
    raise NotImplementedError
