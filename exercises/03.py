"""Exercises of lesson 3: what a spatial and what a temporal layer sees, the merge, and what learns. 45 minutes.

Read first: the docstring of common/temporal.py, and Sec. 3.1 of the paper with Fig. 4. Explains common/temporal.py and
the cell "Training: Eq. (2)". einops' rearrange is enough for all shapes.
"""

import torch
from torch import nn


def as_images(video: torch.Tensor) -> torch.Tensor:
    """What the image model's layers see of clips: b t c h w -> (b t) c h w. 2 min"""
    raise NotImplementedError


def as_clips(z: torch.Tensor, frames: int) -> torch.Tensor:
    """What a convolution over frames sees: (b t) c h w -> b c t (h w). 5 min"""
    raise NotImplementedError


def attend_over_frames(attend, z: torch.Tensor, frames: int) -> torch.Tensor:
    """(b t) c h w -> (b t) c h w. attend: sequences n length c -> n length c, mixing the places of a sequence. Every
    position of the picture shall attend to itself in all frames of its clip, and to nothing else. 15 min"""
    raise NotImplementedError


def merge(z: torch.Tensor, z_prime: torch.Tensor, mix_factor: torch.Tensor, frames: int) -> torch.Tensor:
    """alpha z + (1 - alpha) z' with alpha = sigmoid(mix_factor); z is the spatial branch. z, z': (b t) c h w;
    mix_factor has one value, or one for each of the frames. Where z' = z the result is z to the last bit: find a form
    for which that holds in floating point. 15 min"""
    raise NotImplementedError


def freeze(network: nn.Module) -> None:
    """Leaves only the temporal layers trainable, in place. Their parameters' names contain time_stack, time_mixer,
    time_pos_embed or time_context; time_embed is the embedding of the diffusion time, and spatial. 8 min"""
    raise NotImplementedError
