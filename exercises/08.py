"""Exercises of lesson 8: how many, and in a stream. 25 minutes.

Read first: the docstring of 08_sample_long.py. Explains "The stages".
"""

from collections.abc import Iterable, Iterator


def keys_for(length: int, passes: int) -> int:
    """The fewest key frames of which `passes` interpolation passes make at least `length` frames (the last frames may
    be left out). Whole numbers only: rounding errors of floats show in a video of an hour. 10 min"""
    raise NotImplementedError


def batched(items: Iterable, size: int) -> Iterator[list]:
    """A generator of lists of `size` items, the last one shorter. It takes no more from `items` than the list that is
    asked for: a stream may have no end. 15 min"""
    raise NotImplementedError
