"""Successive halving (1502.07943): after equal shares of the steps the worse half is dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Budget = Literal["full", "halve"]


def rung_ends(budget: Budget, *, settings: int, steps: int) -> list[int]:
    """The steps at which points are compared; the last one is the end.

    >>> rung_ends("halve", settings=8, steps=100)
    [25, 50, 75, 100]
    >>> rung_ends("full", settings=8, steps=100)
    [100]
    """
    rungs = 1
    if budget == "halve":
        # So many halvings leave one setting, which trains through the last rung.
        rungs = math.ceil(math.log2(settings)) + 1
    # A dict, as a set that keeps the order: in a short run rungs may end at the same step.
    ends: dict[int, None] = {}
    for rung in range(1, rungs + 1):
        end = max(round(steps * rung / rungs), 1)
        ends[end] = None
    return list(ends)


def survivors(ranking: Sequence[Sequence[int]]) -> list[int]:
    """The points of the better half of the settings, in their order.

    Args:
      ranking: the points by setting, the best setting first.

    >>> survivors([[2, 5], [0, 1], [3, 4]])
    [0, 1, 2, 5]
    """
    # Of an odd number the middle one stays.
    kept = (len(ranking) + 1) // 2
    members: list[int] = []
    for group in ranking[:kept]:
        members += group
    return sorted(members)


def groups(members: Sequence[int], parallel: int) -> list[list[int]]:
    """The members in groups of about equal size, at most `parallel` each.

    >>> groups([0, 1, 2, 3, 4], 4)
    [[0, 1, 2], [3, 4]]
    """
    # Equal sizes share a compiled program: 3 and 3 of 6, rather than 4 and 2.
    count = math.ceil(len(members) / parallel)
    size = math.ceil(len(members) / count)
    parts = []
    for start in range(0, len(members), size):
        parts.append(list(members[start : start + size]))
    return parts
