"""The accuracy of methods on a benchmark's questions, and whether it differs.

Two things make a difference uncertain: the seeds of the runs, and the choice of the questions. Each
has an interval of its own, and a difference is noise if one of them contains 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lorax_ft.comparison.design import Design
from lorax_ft.comparison.intervals import Interval, mean_interval, paired_interval
from lorax_ft.comparison.methods import reference_of
from lorax_ft.comparison.runs import MethodRuns, Run
from lorax_ft.evaluation.benchmark import CATEGORIES
from lorax_ft.evaluation.estimates import NORMAL_95, micro

ALL = "all"
"""The name of all categories together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """A method at one rate."""

    label: str
    rate: float | None
    """None before training."""
    categories: Mapping[str, Interval]
    """The share of correct answers, over seeds, by category and of all questions."""
    over_seeds: Interval | None = None
    """The difference to the reference on all questions, paired by seed; None for the reference."""
    over_questions: Interval | None = None
    """The same difference, paired by question: the mean over seeds of each question."""

    @property
    def verdict(self) -> str:
        """What the difference says."""
        if self.over_seeds is None or self.over_questions is None:
            return "reference"
        if not (self.over_seeds.excludes_zero and self.over_questions.excludes_zero):
            return "noise"
        return "better" if self.over_seeds.mean > 0 else "worse"


def accuracy_rows(
    methods: Mapping[str, MethodRuns],
    rates: Mapping[str, float],
    design: Design,
    categories: Sequence[str],
    *,
    before: str,
) -> list[AccuracyRow]:
    """A row for the model before training, and one for each method at its rate.

    Args:
      methods: the runs of each method, with `Run.correct`.
      rates: the rate of each method.
      design: the seeds.
      categories: the category of each question.
      before: the answers before training, as `Run.correct`.
    """
    name_of_reference = reference_of(methods)
    reference = _answers(methods[name_of_reference].at(rates[name_of_reference], design.seeds))
    # The base has no seed: each pair is with the same answers.
    base = np.stack([_digits(before)] * len(reference))
    rows = [_row("before training", None, base, reference, categories)]
    for name, its in methods.items():
        own = _answers(its.at(rates[name], design.seeds))
        paired = None if name == name_of_reference else reference
        rows.append(_row(its.method.label, rates[name], own, paired, categories))
    return rows


def _row(
    label: str,
    rate: float | None,
    own: np.ndarray,
    reference: np.ndarray | None,
    categories: Sequence[str],
) -> AccuracyRow:
    """The row of answers `[S, N]` of S seeds to N questions."""
    shares = {}
    of_category = np.array(categories)
    for name in CATEGORIES:
        chosen = of_category == name
        if chosen.any():
            shares[name] = mean_interval(own[:, chosen].mean(axis=1).tolist())
    shares[ALL] = mean_interval(own.mean(axis=1).tolist())
    if reference is None:
        return AccuracyRow(label=label, rate=rate, categories=shares)
    over_seeds = paired_interval(own.mean(axis=1).tolist(), reference.mean(axis=1).tolist())
    # What both methods find easy or hard cancels.
    by_question = micro((own - reference).mean(axis=0))
    over_questions = Interval(by_question.mean, NORMAL_95 * (by_question.error or 0.0))
    return AccuracyRow(
        label=label,
        rate=rate,
        categories=shares,
        over_seeds=over_seeds,
        over_questions=over_questions,
    )


def _answers(runs: Sequence[Run]) -> np.ndarray:
    """1 where a run answers a question correctly, else 0, `[S, N]`."""
    return np.stack([_digits(run.correct) for run in runs])


def _digits(correct: str) -> np.ndarray:
    return np.array(list(correct), np.float64)
