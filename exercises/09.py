"""Exercises of lesson 9: interpolation that is told at the input, and clips longer than trained. 25 minutes.

Read first: App. D and H.2 of the paper; the docstring of 09_text_to_video.py. Explains "Interpolation" there, and
FrameAttention in common/temporal.py.
"""

import torch


def noised_context(z: torch.Tensor, eps: torch.Tensor, mask: torch.Tensor, levels: torch.Tensor, alpha: torch.Tensor,
                   sigma: torch.Tensor) -> torch.Tensor:
    """(m * z', m), z' the latents diffused to a level of each clip: (b t) c h w, mask b t, levels b (diffusion times),
    alpha and sigma tables of 1000 levels -> (b t) c+1 h w. What is hidden stays zero. 15 min"""
    raise NotImplementedError


def within_reach(frames: int, reach: int) -> torch.Tensor:
    """t t of booleans: whether frame i attends to frame j, those at most `reach` frames away on either side; with reach
    0 at any distance. It lets a model trained on 8 frames make 32. 10 min"""
    raise NotImplementedError
