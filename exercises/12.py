"""Exercises of lesson 12: the distance behind FVD and FID, and when an ordering holds. 35 minutes.

Read first: the docstrings of extra/metrics.py and of judging/verdicts.py. Explains both.
"""

import torch


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of features n d and m d, as if both were normal: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B unbiased
    covariances. The trace of the root is the sum of the roots of the eigenvalues of A B. In float64. 20 min"""
    raise NotImplementedError


def ordering_holds(better: list[float], worse: list[float]) -> bool:
    """Whether "better is below worse" holds over paired seeds: in every seed, and the mean difference exceeds twice its
    standard error (unbiased deviation over the root of the number). Fewer than three seeds prove nothing. 15 min"""
    raise NotImplementedError
