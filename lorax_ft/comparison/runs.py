"""The runs of a comparison: a search over rates for each method, then all seeds at its best rate.

The runs of a method are one sweep: they share a base and train together, in one program.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lorax_ft.comparison.design import Design, points
from lorax_ft.comparison.methods import Method, config_of
from lorax_ft.config import Config
from lorax_ft.run.validation import METRIC
from lorax_ft.sweep.agree import changes_quantized_base, with_shared_base
from lorax_ft.sweep.axes import rounded
from lorax_ft.sweep.loop import run_points
from lorax_ft.sweep.results import LOSSES, RESULTS, read_lines
from lorax_ft.sweep.setup import Loaded, SweepJob, load, set_up
from lorax_ft.sweep.stack import take

MOST_EXTENSIONS = 3
"""How often the rates are extended where the best one is the lowest or the highest."""
TIMED_STEPS = 5


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method costs, measured on a run of its own."""

    parameters: int
    """Numbers that train."""
    seconds_per_step: float
    """Median of a few steps."""
    memory: int | None
    """Bytes of the step's arguments and temporaries, by XLA's analysis; None if it has none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodRuns:
    """The runs of a method."""

    method: Method
    runs: tuple[Run, ...]
    best_rate: float
    """The rate of the lowest mean loss on the set to choose by, over the search seeds."""
    at_edge: bool
    """Whether that is still the lowest or the highest rate that was tried."""
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
    """

    def __init__(self, design: Design, console: Console, folder: Path, *, parallel: int) -> None:
        self._design = design
        self._console = console
        self._folder = folder
        self._parallel = parallel
        # Methods on the same base share it.
        self._loaded: dict[Any, Loaded] = {}
        self.steps = 0
        """The steps of a run."""

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
        searched = design.seeds[: design.search_seeds]
        rates = list(design.rates)
        runs = self._train(config, rates, searched, folder / "search")
        for extension in range(MOST_EXTENSIONS):
            best = best_rate(runs)
            if best not in (rates[0], rates[-1]):
                break
            # A minimum at the edge is perhaps none: the next rate may be better still.
            is_low = best == rates[0]
            new = best / design.factor if is_low else best * design.factor
            # Few digits, so that a config file with the rate can be read.
            new = rounded(new)
            self._console.print(f"The best rate is at the edge, {best:g}; trying {new:g}.")
            rates = sorted([*rates, new])
            runs += self._train(config, [new], searched, folder / f"search-{extension + 1}")
        best = best_rate(runs)
        # The seeds that the search did not train. Those that it did are compared too.
        rest = design.seeds[design.search_seeds :]
        if rest:
            # Once, where both rates are the same.
            compared = list(dict.fromkeys([design.common_rate, best]))
            runs += self._train(config, compared, rest, folder / "seeds")
        return MethodRuns(
            method=method,
            runs=tuple(runs),
            best_rate=best,
            at_edge=best in (rates[0], rates[-1]),
            cost=self._measure(config, rates[0]),
        )

    def _train(
        self, config: Config, rates: Sequence[float], seeds: Sequence[int], folder: Path
    ) -> list[Run]:
        """Train a run for each rate and seed, unless the folder holds them."""
        # QPiSSA and LoftQ have a base of its own for each seed.
        if changes_quantized_base(config) and len(seeds) > 1:
            runs = []
            for seed in seeds:
                runs += self._train_points(config, rates, [seed], folder / f"seed-{seed}")
            return runs
        return self._train_points(config, rates, seeds, folder)

    def _train_points(
        self, config: Config, rates: Sequence[float], seeds: Sequence[int], folder: Path
    ) -> list[Run]:
        """The same for runs that share a base, in one sweep."""
        chosen = with_shared_base(points(config, rates, seeds))
        loaded = self._load(config)
        self.steps = steps = loaded.steps(config)
        folder.mkdir(parents=True, exist_ok=True)
        # Of a comparison that was interrupted, what it has trained to the end is kept.
        if not _is_complete(folder, len(chosen), steps):
            job = set_up(chosen, loaded)
            run_points(job, self._console, folder=folder, parallel=self._parallel)
        return _read_runs(folder)

    def _load(self, config: Config) -> Loaded:
        """The base, loaded once for each format."""
        key = (config.model, config.quant)
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


def measure_cost(job: SweepJob) -> Cost:
    """The parameters, the time of a step and the memory of the only point of a job."""
    # A copy, for a step donates its state.
    state, owned, keys = take((job.state, job.owned, job.keys), [0])
    program = job.compile([0], state, owned)
    seconds = []
    for step in range(TIMED_STEPS + 1):
        batch, _ = job.batch([0], step)
        start = time.perf_counter()
        state, metrics = program.step(state, owned, job.base, batch, keys)
        # A call returns before the device has computed.
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    analysis = program.step.memory_analysis()
    memory = None
    if analysis is not None:
        memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    return Cost(
        parameters=parameters,
        # The first step also fills caches.
        seconds_per_step=statistics.median(seconds[1:]),
        memory=memory,
    )


def _is_complete(folder: Path, count: int, steps: int) -> bool:
    """Whether a folder holds the end of so many runs."""
    # Also of points that diverged, which train on beside the others.
    ended = set()
    for line in read_lines(folder / RESULTS):
        if line["step"] == steps and METRIC in " ".join(line):
            ended.add(line["point"])
    return len(ended) == count


def _read_runs(folder: Path) -> list[Run]:
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
