"""Means of items, such as questions, with their standard errors.

Differences between two models on the same items are means of differences: what both models find
easy or hard cancels, so that the interval is narrower than those of the two means.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

NORMAL_95 = 1.959963984540054
"""The normal distribution has 95 % of its mass within so many standard deviations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, and how far it may be from that of all items that could have been asked."""

    mean: float
    error: float | None
    """The standard error; None where it is unknown, as from a single item."""
    count: int
    """Number of items."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, mean ± 1.96 · error; None without an error."""
        if self.error is None:
            return None
        half = NORMAL_95 * self.error
        return self.mean - half, self.mean + half


def micro(values: np.ndarray) -> Estimate:
    """The mean of all items, each of the same weight.

    The error is s / √n with s² = Σ (x − mean)² / (n − 1), as in lm-evaluation-harness.

    Args:
      values: `[N]`, such as 1 for each correct answer and 0 for each wrong one.

    >>> estimate = micro(np.array([1, 1, 0, 1]))
    >>> estimate.mean, estimate.error
    (0.75, 0.25)
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    mean = float(values.mean())
    if n < 2:
        # One item says nothing about how items differ.
        return Estimate(mean=mean, error=None, count=n)
    s = float(values.std(ddof=1))
    return Estimate(mean=mean, error=s / math.sqrt(n), count=n)


def macro(values: np.ndarray, groups: Sequence[str]) -> Estimate:
    """The mean of the means of G groups, such as subjects, each of the same weight.

    The groups are fixed, and only their items are a sample, so the error is √(Σ e²) / G with the
    error e of each group. It is None if a group has a single item.

    Args:
      values: `[N]`.
      groups: the group of each item.

    >>> macro(np.array([1, 1, 0, 1]), ["law", "law", "art", "art"]).mean
    0.75
    """
    labels = np.array(groups)
    means = []
    squares = []
    for group in dict.fromkeys(groups):
        estimate = micro(values[labels == group])
        means.append(estimate.mean)
        # A group of one item has no error, and so the whole has none.
        if estimate.error is not None:
            squares.append(estimate.error**2)
    count = len(means)
    mean = sum(means) / count
    error = None
    if len(squares) == count:
        error = math.sqrt(sum(squares)) / count
    return Estimate(mean=mean, error=error, count=len(values))


def ratio(sums: np.ndarray, weights: np.ndarray) -> Estimate:
    """Σ sums / Σ weights over rows, such as a loss per token of rows of different lengths.

    The error is √(n / (n − 1) · Σ (x − R w)²) / Σ w, with R the ratio: that of a ratio estimator,
    whose rows are the sample. Tokens of one row depend on one another, so they are not.

    Args:
      sums: x, `[N]`.
      weights: w, `[N]`.

    >>> ratio(np.array([2.0, 6.0]), np.array([1.0, 3.0]))
    Estimate(mean=2.0, error=0.0, count=2)
    """
    sums = np.asarray(sums, np.float64)
    weights = np.asarray(weights, np.float64)
    n = len(sums)
    total = float(weights.sum())
    mean = float(sums.sum()) / total
    if n < 2:
        return Estimate(mean=mean, error=None, count=n)
    # How far each row is from what its weight alone would give.
    residuals = sums - mean * weights
    squares = float((residuals**2).sum())
    error = math.sqrt(n / (n - 1) * squares) / total
    return Estimate(mean=mean, error=error, count=n)
