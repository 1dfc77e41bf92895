"""The tables of a comparison: means, paired differences, and whether those are noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lorax_ft.comparison.design import Design
from lorax_ft.comparison.intervals import Interval, mean_interval, paired_interval
from lorax_ft.comparison.methods import reference_of
from lorax_ft.comparison.runs import MethodRuns, Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A method at one rate."""

    label: str
    rate: float
    loss: Interval
    """The loss on the set to judge by, over the seeds."""
    difference: Interval | None
    """To the reference, paired by seed; None for the reference itself."""
    others: Mapping[str, Interval]
    """The change of the loss since before training, on each further validation set."""
    at_edge: bool = False

    @property
    def verdict(self) -> str:
        """What the difference says."""
        if self.difference is None:
            return "reference"
        if not math.isfinite(self.loss.mean):
            return "diverged"
        if not math.isfinite(self.difference.mean):
            return "the reference diverged"
        if not self.difference.excludes_zero:
            return "noise"
        return "lower loss" if self.difference.mean < 0 else "higher loss"


def rows_at_common_rate(methods: Mapping[str, MethodRuns], design: Design) -> list[Row]:
    """A row for each method at the common rate."""
    return _rows(methods, common_rates(methods, design), design)


def rows_at_best_rates(methods: Mapping[str, MethodRuns], design: Design) -> list[Row]:
    """A row for each method at the rate that was chosen for it."""
    return _rows(methods, best_rates(methods), design)


def common_rates(methods: Mapping[str, MethodRuns], design: Design) -> dict[str, float]:
    """The common rate for each method."""
    return dict.fromkeys(methods, design.common_rate)


def best_rates(methods: Mapping[str, MethodRuns]) -> dict[str, float]:
    """The rate that was chosen for each method."""
    return {name: its.best_rate for name, its in methods.items()}


def _rows(
    methods: Mapping[str, MethodRuns], rates: Mapping[str, float], design: Design
) -> list[Row]:
    name_of_reference = reference_of(methods)
    runs_of_reference = methods[name_of_reference].at(rates[name_of_reference], design.seeds)
    reference = _judged(runs_of_reference)
    rows = []
    for name, its in methods.items():
        runs = its.at(rates[name], design.seeds)
        losses = _judged(runs)
        # To itself, the reference differs by 0 with certainty.
        difference = None
        if name != name_of_reference:
            difference = paired_interval(losses, reference)
        row = Row(
            label=its.method.label,
            rate=rates[name],
            loss=mean_interval(losses),
            difference=difference,
            others=_changes(runs),
            # At the common rate, it does not matter where the best one lies.
            at_edge=its.at_edge and rates[name] == its.best_rate,
        )
        rows.append(row)
    return rows


def judged_set(run: Run) -> str:
    """The validation set to judge by: the second one, as the first one chooses the rate."""
    names = list(run.losses)
    # A config with one set of its own chooses and judges by it.
    return names[min(1, len(names) - 1)]


def _judged(runs: Sequence[Run]) -> list[float]:
    return [run.losses[judged_set(run)] for run in runs]


def _changes(runs: Sequence[Run]) -> dict[str, Interval]:
    """How the loss on further sets changed: what was forgotten."""
    changes = {}
    # Behind the set that chooses and the set that judges.
    others = list(runs[0].losses)[2:]
    for name in others:
        # To the same run before training, for a quantized base starts at another loss.
        differences = [run.losses[name] - run.first_losses[name] for run in runs]
        changes[name] = mean_interval(differences)
    return changes
