"""What a task measures, item by item, and the means of it.

Items of two models are subtracted one by one, so that a difference has the same means and errors as
a score (see `estimates`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from lorax_ft.evaluation.benchmark import CATEGORIES
from lorax_ft.evaluation.estimates import Estimate, macro, micro, ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """The values of one metric for all items of a task."""

    values: np.ndarray
    """`[N]`: for a ratio the sums of rows, else the score of each item."""
    weights: np.ndarray | None = None
    """`[N]`: what the sums of rows are divided by, such as tokens; None: each item counts 1."""
    subjects: tuple[str, ...] = ()
    """The subject of each item, if they have any."""
    categories: tuple[str, ...] = ()
    """The category of each item."""
    unit: Literal["fraction", "nats"] = "fraction"

    def minus(self, other: Items) -> Items:
        """The items of a difference; both must be of the same items."""
        return dataclasses.replace(self, values=self.values - other.values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The means of a metric."""

    total: Estimate
    """Over all items, each of the same weight: the micro average, or a ratio."""
    macro: Estimate | None = None
    """Over subjects, each of the same weight; None if there are no subjects."""
    categories: Mapping[str, tuple[Estimate, Estimate]] = dataclasses.field(default_factory=dict)
    """Of each category that has items: micro and macro average."""
    subjects: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        if self.macro is None:
            return estimate_json(self.total)
        categories = {}
        for name, (each_question, each_subject) in self.categories.items():
            categories[name] = {
                "micro": estimate_json(each_question),
                "macro": estimate_json(each_subject),
            }
        return {
            "micro": estimate_json(self.total),
            "macro": estimate_json(self.macro),
            "categories": categories,
            "subjects": {name: estimate_json(each) for name, each in self.subjects.items()},
        }


def estimates(items: Items) -> Scores:
    """Averages the values of items over all of them, by category and by subject."""
    if items.weights is not None:
        return Scores(total=ratio(items.values, items.weights))
    total = micro(items.values)
    if not items.subjects:
        return Scores(total=total)
    # In a fixed order, without those of which no subject was read.
    categories = {}
    of_category = np.array(items.categories)
    of_subject = np.array(items.subjects)
    for name in CATEGORIES:
        chosen = of_category == name
        if chosen.any():
            values, names = items.values[chosen], of_subject[chosen].tolist()
            categories[name] = (micro(values), macro(values, names))
    # A dict, as a set that keeps the order.
    subjects = {}
    for name in dict.fromkeys(items.subjects):
        subjects[name] = micro(items.values[of_subject == name])
    return Scores(
        total=total,
        macro=macro(items.values, items.subjects),
        categories=categories,
        subjects=subjects,
    )


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON values."""
    interval = estimate.interval
    return {
        "mean": estimate.mean,
        "error": estimate.error,
        "interval": None if interval is None else list(interval),
        "count": estimate.count,
    }
