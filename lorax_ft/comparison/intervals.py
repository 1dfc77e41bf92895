"""Means over seeds and their 95 % intervals. Imports no JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    half_width: float
    """Infinite with fewer than two values, or a value that is infinite."""

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        if math.isinf(self.half_width):
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} ± {self.half_width:.4f}"


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of a few runs and its 95 % interval: t · s / √n, with Student's t of n − 1.

    >>> mean_interval([1.0, 2.0, 3.0])
    Interval(mean=2.0, half_width=2.48413771...)
    """
    n = len(values)
    mean = float(np.mean(values))
    # One run says nothing about how runs differ, and a diverged one makes the deviation undefined.
    if n < 2 or not math.isfinite(mean):
        return Interval(mean, math.inf)
    # 2.5 % on each side. With three seeds it is 4.3, where a normal distribution has 1.96.
    quantile = float(student_t.ppf(0.975, n - 1))
    deviation = float(np.std(values, ddof=1))
    return Interval(mean, quantile * deviation / math.sqrt(n))


def paired_interval(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """The mean difference of runs to those of another method with the same seeds, in order.

    What a seed makes harder for both methods cancels.
    """
    differences = []
    for own, other in zip(values, reference, strict=True):
        differences.append(own - other)
    return mean_interval(differences)
