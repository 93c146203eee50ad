"""Exercises of lesson 4: a decoder for clips, and videos longer than it takes at once. 40 minutes.

Read first: the docstrings of 04_decoder_finetune.py and common/portions.py. Explains "Losses" and `decode_stream`.
"""

import torch


def perceptual_distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """As LPIPS: of features at several scales (each b c h w, of two batches of pictures), normalised to length 1 along
    the channels, the squared distance, averaged over batch and positions and summed over scales. A scalar. 15 min"""
    raise NotImplementedError


def portions(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """How a video of `length` frames goes through a network in portions of `size` frames: (first frame, how many of its
    last frames are new) of each. The next portion begins again with the last `overlap` frames of the one before. All
    portions are full: the last one reaches back as far as it has to; only a video shorter than `size` is one short
    portion. 15 min"""
    raise NotImplementedError


def fade(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Overlapping frames of two portions, n c h w each: the weight of the new ones rises evenly, 1 / (n + 1), 2 / (n +
    1), ..., n / (n + 1), so that there is no cut. 10 min"""
    raise NotImplementedError
