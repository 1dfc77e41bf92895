"""Evaluation of a model on tasks: the base, and its adapter switched off and on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console

from lorax_ft.evaluation.items import Scores, estimates
from lorax_ft.evaluation.tasks import Outcome, Task
from lorax_ft.lowrank.adapters import disable_adapters
from lorax_ft.models.model import LoadedModel
from lorax_ft.run.progress import progress_bar
from lorax_ft.tree import Tree

Variant = Literal["base", "off", "on"]
VARIANTS: tuple[Variant, ...] = ("base", "off", "on")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What the variants of a model scored in a task."""

    task: Task
    outcomes: Mapping[str, Outcome]
    """By variant."""
    scores: Mapping[str, Mapping[str, Scores]]
    """By metric and variant."""
    differences: Mapping[str, Mapping[str, Scores]]
    """By metric and pair of variants, such as "on - base"."""

    def to_json(self) -> dict[str, Any]:
        """The scores as JSON values."""
        scores, differences = {}, {}
        for metric, by_variant in self.scores.items():
            scores[metric] = {name: score.to_json() for name, score in by_variant.items()}
        for metric, by_pair in self.differences.items():
            differences[metric] = {name: score.to_json() for name, score in by_pair.items()}
        corpus = {name: dict(outcome.corpus) for name, outcome in self.outcomes.items()}
        return {
            "task": self.task.name,
            "settings": dict(self.task.settings),
            "scores": scores,
            "differences": differences,
            "corpus": {name: values for name, values in corpus.items() if values},
        }


def variants_of(
    model: LoadedModel, params: Tree, wanted: Sequence[Variant] = VARIANTS
) -> dict[str, Tree]:
    """The parameters of each variant.

    A base from which a run subtracted its adapter's start is no model by itself, so it is left out:
    with the adapter off it is the original.

    Args:
      model: the model as it was loaded.
      params: its parameters, with the adapter if there is one.
      wanted: the variants, in their order.

    Raises:
      ValueError: a variant needs an adapter, and there is none.
    """
    # An adapter would have made another tree.
    if params is model.params:
        if "base" not in wanted:
            raise ValueError(f"{model.source} has no adapter to switch; give --adapter FOLDER")
        return {"base": params}
    variants: dict[str, Tree] = {}
    for name in wanted:
        if name == "on":
            variants[name] = params
        elif name == "off":
            variants[name] = disable_adapters(params, model.params, layout=model.layout)
        elif not model.without_start:
            variants[name] = model.params
    return variants


def run_task(task: Task, variants: Mapping[str, Tree], console: Console) -> Result:
    """Does a task with each variant, with a progress bar."""
    outcomes = {}
    for name, params in variants.items():
        title = f"{task.name}, {describe(name)}" if len(variants) > 1 else task.name
        with progress_bar(console, title) as advance:
            outcomes[name] = task.run(params, _by_fraction(advance, task.count))
    scores: dict[str, dict[str, Scores]] = {}
    differences: dict[str, dict[str, Scores]] = {}
    for name, outcome in outcomes.items():
        for metric, items in outcome.metrics.items():
            scores.setdefault(metric, {})[name] = estimates(items)
    # Each variant against those before it, so that "on - base" is positive if the adapter scores
    # higher.
    names = list(outcomes)
    for place, name in enumerate(names):
        for other in names[:place]:
            for metric, items in outcomes[name].metrics.items():
                paired = items.minus(outcomes[other].metrics[metric])
                pair = f"{name} - {other}"
                differences.setdefault(metric, {})[pair] = estimates(paired)
    return Result(task=task, outcomes=outcomes, scores=scores, differences=differences)


def describe(variant: str) -> str:
    """A variant in words."""
    return variant if variant == "base" else f"adapter {variant}"


def _by_fraction(advance: Any, count: int) -> Any:
    """A function of a number of items, from one of a fraction."""
    return lambda items: advance(items / count)
