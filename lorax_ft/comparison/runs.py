"""The runs of a comparison: a search over rates for each method, then all seeds at its best rate.

The runs of a method are one sweep: they share a base and train together, in one program.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lorax_ft.comparison.benchmark import Task, correct_answers
from lorax_ft.comparison.cost import Cost, measure_cost
from lorax_ft.comparison.design import Design, points
from lorax_ft.comparison.methods import Method, config_of
from lorax_ft.config import Config
from lorax_ft.evaluation.multiple_choice import Encoded
from lorax_ft.files import named_errors
from lorax_ft.models.model import Model
from lorax_ft.run.checkpoints import FOLDER, Checkpoints
from lorax_ft.run.progress import progress_bar
from lorax_ft.run.validation import METRIC
from lorax_ft.sweep.agree import changes_quantized_base, with_shared_base
from lorax_ft.sweep.axes import RATE, Point, rounded
from lorax_ft.sweep.loop import run_points
from lorax_ft.sweep.results import LOSSES, RESULTS, read_lines
from lorax_ft.sweep.setup import Loaded, load, set_up
from lorax_ft.tree import Tree

ANSWERS = "answers.jsonl"
MOST_EXTENSIONS = 3
"""How often the rates are extended where the best one is the lowest or the highest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run: a method at a rate with a seed."""

    rate: float
    seed: int
    losses: Mapping[str, float]
    """The final losses by validation set; infinite where the run diverged."""
    first_losses: Mapping[str, float]
    """The losses before training."""
    curve: tuple[tuple[int, float], ...]
    """The training loss by step."""
    correct: str = ""
    """1 for each question of a benchmark that it answers correctly, else 0; empty without one, or
    at a rate that is not compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that trained together."""

    points: Sequence[Point]
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodRuns:
    """The runs of a method."""

    method: Method
    runs: tuple[Run, ...]
    best_rate: float
    """The rate of the lowest mean loss on the set to choose by, over the search seeds."""
    at_edge: bool
    """Whether that is still the lowest or the highest rate that was tried."""
    steps: int
    """Of each run."""
    cost: Cost

    def at(self, rate: float, seeds: Sequence[int]) -> list[Run]:
        """The runs at a rate, in the order of the seeds."""
        # In order, since differences are paired by place (`paired_interval`).
        found = {run.seed: run for run in self.runs if run.rate == rate}
        return [found[seed] for seed in seeds]


class Runner:
    """Trains the runs of one method after another.

    Args:
      design: rates and seeds.
      console: where to print.
      folder: a subfolder for each method holds its runs; runs that it already holds are read.
      parallel: runs that train together, at most.
      task: the questions that methods are judged by; None: by their loss alone.
    """

    def __init__(
        self,
        design: Design,
        console: Console,
        folder: Path,
        *,
        parallel: int,
        task: Task | None = None,
    ) -> None:
        self._design = design
        self._task = task
        self._console = console
        self._folder = folder
        self._parallel = parallel
        # Methods on the same base share it.
        self._loaded: dict[Any, Loaded] = {}
        self._encoded: Encoded | None = None

    def run(self, name: str, method: Method, config: Config) -> MethodRuns:
        """Search for the method's best rate, and train all seeds there and at the common rate.

        Args:
          name: of the method, and of its folder.
          method: the method.
          config: what all methods share.
        """
        design = self._design
        config = config_of(method, config)
        folder = self._folder / name
        # Before hours of training: a question may be too long for the model.
        if self._task is not None and self._encoded is None:
            self._encoded = self._task.encode(self._load(config).model)
        groups, rates = self._search(config, folder)
        best = best_rate(_read_runs(groups))
        # Once, where both rates are the same.
        compared = list(dict.fromkeys([design.common_rate, best]))
        # The seeds that the search did not train. Those that it did are compared too.
        rest = design.seeds[design.search_seeds :]
        if rest:
            groups += self._train(config, compared, rest, folder / "seeds")
        if self._task is not None:
            for group in groups:
                self._answer(group, compared)
        return MethodRuns(
            method=method,
            runs=tuple(_read_runs(groups)),
            best_rate=best,
            at_edge=best in (rates[0], rates[-1]),
            steps=self._load(config).steps(config),
            cost=self._measure(config, rates[0]),
        )

    def _search(self, config: Config, folder: Path) -> tuple[list[Group], list[float]]:
        """Train the search seeds at all rates, and beyond them where the best one is at the edge.

        Returns:
          The runs, and the rates that were tried, the smallest first.
        """
        design = self._design
        seeds = design.seeds[: design.search_seeds]
        rates = list(design.rates)
        groups = self._train(config, rates, seeds, folder / "search")
        for extension in range(MOST_EXTENSIONS):
            best = best_rate(_read_runs(groups))
            if best not in (rates[0], rates[-1]):
                break
            # A minimum at the edge is perhaps none: the next rate may be better still.
            is_low = best == rates[0]
            new = best / design.factor if is_low else best * design.factor
            # Few digits, so that a config file with the rate can be read.
            new = rounded(new)
            self._console.print(f"The best rate is at the edge, {best:g}; trying {new:g}.")
            rates = sorted([*rates, new])
            groups += self._train(config, [new], seeds, folder / f"search-{extension + 1}")
        return groups, rates

    def _train(
        self, config: Config, rates: Sequence[float], seeds: Sequence[int], folder: Path
    ) -> list[Group]:
        """Train a run for each rate and seed, unless the folder holds them."""
        # QPiSSA and LoftQ have a base of its own for each seed.
        if changes_quantized_base(config) and len(seeds) > 1:
            groups = []
            for seed in seeds:
                groups += self._train_points(config, rates, [seed], folder / f"seed-{seed}")
            return groups
        return self._train_points(config, rates, seeds, folder)

    def _train_points(
        self, config: Config, rates: Sequence[float], seeds: Sequence[int], folder: Path
    ) -> list[Group]:
        """The same for runs that share a base, in one sweep."""
        chosen = with_shared_base(points(config, rates, seeds))
        loaded = self._load(config)
        folder.mkdir(parents=True, exist_ok=True)
        # Of a comparison that was interrupted, what it has trained to the end is kept.
        if not _is_complete(folder, len(chosen), loaded.steps(config)):
            job = set_up(chosen, loaded)
            run_points(job, self._console, folder=folder, parallel=self._parallel)
        return [Group(points=chosen, folder=folder)]

    def _answer(self, group: Group, rates: Sequence[float]) -> None:
        """Ask the task's questions of the runs of a group at these rates, unless it holds them."""
        file = group.folder / ANSWERS
        held = {line["point"] for line in read_lines(file)}
        missing = []
        for point in group.points:
            if point.settings[RATE] in rates and point.number not in held:
                missing.append(point.number)
        if not missing:
            return
        job = set_up(group.points, self._load(group.points[0].config))
        checkpoints = Checkpoints(group.folder / FOLDER / "0", keep=1)
        found = checkpoints.find()
        if found.step is None:
            raise ValueError(
                f"{group.folder} has no intact checkpoint; delete it, and its runs train again"
            )
        state, _ = checkpoints.restore(job.state, job.owned, step=found.step)
        for k in missing:
            correct = self._ask(job.model, job.params(state, k), group.points[k].name)
            line = json.dumps({"point": k, "correct": correct})
            if jax.process_index() == 0:
                with named_errors(file), file.open("a") as lines:
                    lines.write(line + "\n")

    def answers_before(self, config: Config) -> str:
        """The answers of the base, as `Run.correct`."""
        model = self._load(config)
        return self._ask(model.model, model.model.params, "before training")

    def _ask(self, model: Model, params: Tree, name: str) -> str:
        """Which questions of the task the parameters answer correctly, as `Run.correct`."""
        encoded = self._encoded
        assert encoded is not None
        with progress_bar(self._console, f"questions: {name}") as advance:
            share = 1 / len(encoded.prompts)
            found = correct_answers(model, params, encoded, lambda count: advance(count * share))
        return "".join(str(int(value)) for value in found)

    def _load(self, config: Config) -> Loaded:
        """The base and the data, loaded once for each format."""
        # Methods may differ in their data too, as in the length of its rows.
        key = (config.model, config.quant, config.data, config.adapter.continue_from)
        if key not in self._loaded:
            # One base at a time: a large model would not fit twice.
            self._loaded = {key: load(config)}
        return self._loaded[key]

    def _measure(self, config: Config, rate: float) -> Cost:
        """The cost of a single run."""
        chosen = with_shared_base(points(config, [rate], self._design.seeds[:1]))
        job = set_up(chosen, self._load(config))
        return measure_cost(job)


def best_rate(runs: Sequence[Run]) -> float:
    """The rate with the lowest mean loss on the set to choose by, the first validation set."""
    losses: dict[float, list[float]] = {}
    for run in runs:
        first = next(iter(run.losses.values()))
        losses.setdefault(run.rate, []).append(first)
    # The seeds that every rate has; a diverged run makes the mean infinite.
    return min(losses, key=lambda rate: statistics.fmean(losses[rate]))


def _is_complete(folder: Path, count: int, steps: int) -> bool:
    """Whether a folder holds the end of so many runs."""
    # Also of points that diverged, which train on beside the others.
    ended = set()
    for line in read_lines(folder / RESULTS):
        if line["step"] == steps and METRIC in " ".join(line):
            ended.add(line["point"])
    return len(ended) == count


def _read_runs(groups: Sequence[Group]) -> list[Run]:
    """The runs of some groups."""
    runs = []
    for group in groups:
        runs += _read_folder(group.folder)
    return runs


def _read_folder(folder: Path) -> list[Run]:
    """The runs that a sweep left in a folder."""
    curves: dict[int, list[tuple[int, float]]] = {}
    for line in read_lines(folder / LOSSES):
        for number, loss in zip(line["points"], line["loss"], strict=True):
            curves.setdefault(number, []).append((line["step"], _finite(loss)))
    first: dict[int, dict[str, Any]] = {}
    last: dict[int, dict[str, Any]] = {}
    diverged = set()
    for line in read_lines(folder / RESULTS):
        number = line["point"]
        # A line of its own, beside those of the evaluations.
        if "diverged" in line:
            diverged.add(number)
            continue
        first.setdefault(number, line)
        last[number] = line
    answers = {line["point"]: line["correct"] for line in read_lines(folder / ANSWERS)}
    runs = []
    for number, line in last.items():
        losses = _losses(line)
        if number in diverged:
            losses = dict.fromkeys(losses, math.inf)
        run = Run(
            rate=line["optim.learning_rate"],
            seed=line["train.seed"],
            losses=losses,
            first_losses=_losses(first[number]),
            curve=tuple(curves.get(number, ())),
            correct=answers.get(number, ""),
        )
        runs.append(run)
    return runs


def _losses(line: Mapping[str, Any]) -> dict[str, float]:
    """The losses of a line by the name of the validation set."""
    losses = {}
    for name, value in line.items():
        if name.startswith(METRIC):
            # The metric of a set with a name is METRIC/name.
            set_name = name.removeprefix(METRIC).removeprefix("/")
            losses[set_name] = _finite(value)
    return losses


def _finite(value: float | None) -> float:
    """The value; infinite for one that was not finite, which JSON lines hold as null."""
    if value is None or not np.isfinite(value):
        return math.inf
    return value
