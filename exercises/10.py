"""Exercises of lesson 10: one particular car, and who is told of it. 20 minutes.

Read first: Sec. 4.2.1 of the paper; the docstring of 10_personalization.py. Explains "The subject, and how it is
called" and "The video model" there.
"""

from collections.abc import Sequence

import torch


def captions(places: Sequence[str], token: str, class_word: str) -> tuple[list[str], list[str]]:
    """What the spatial layers read, such as "a sks car in the snow", and what the temporal layers read, which have
    never seen the token: the same without it. One of each a place, which may be empty; none ends in a space. 8 min"""
    raise NotImplementedError


def insert(video: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by name. video: of a video model, spatial and temporal; tuned: of the image model after DreamBooth.
    -> those of the personalised video model. `video` is compared with afterwards, so it stays what it is. 12 min"""
    raise NotImplementedError
