"""Exercises of lesson 6: from N frames to 4 (N - 1) + 1. 30 minutes.

Read first: Sec. 3.3 of the paper. Explains "Eq. (3) with another mask" and `interpolate`.
"""

from collections.abc import Callable

import torch


def interpolation_mask(clips: int) -> torch.Tensor:
    """clips 5, of zeros and ones: both ends are known, the three frames between are asked for. 3 min"""
    raise NotImplementedError


def length_after(frames: int, passes: int) -> int:
    """How long a video of so many frames is after so many passes, each of which puts three frames between neighbours.
    5 min"""
    raise NotImplementedError


def interpolate(fill: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """One pass: n c h w -> 4 (n - 1) + 1 c h w. fill(first, last), p c h w each, gives p 5 c h w, which begin and end
    with the frames given. All pairs of neighbours in one call; every frame once, in order. 20 min"""
    raise NotImplementedError
