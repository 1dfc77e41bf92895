"""Settings drawn by optuna, by ask-and-tell: a generation of adapters trains in one program.

The sampler is seeded, so a resumed sweep asks again for the same settings, and tells it the losses
that results.jsonl has.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.sweep.agree import SEED, with_shared_base
from lorax_ft.sweep.axes import Axis, Point, Range, make_point, rounded
from lorax_ft.sweep.halving import Budget
from lorax_ft.sweep.loop import run_points
from lorax_ft.sweep.outcome import merged, save_best
from lorax_ft.sweep.results import Results
from lorax_ft.sweep.session import Session
from lorax_ft.sweep.setup import set_up

GENERATION = 8
"""Settings that are asked for at once, at most: optuna learns between generations only."""


def check_tuning(axes: Sequence[Axis | Range], budget: Budget) -> None:
    """Raise unless optuna can draw settings from these axes.

    Raises:
      ValueError: optuna is not installed, or options exclude one another.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ValueError(
            '--trials needs optuna, which is not installed; run pip install "lorax_ft[tune]"'
        )
    if budget != "full":
        raise ValueError(
            f"--trials and --budget {budget} exclude one another: optuna compares points of equal "
            "steps; remove one of them"
        )
    if all(axis.field == SEED for axis in axes):
        raise ValueError(f"--trials has only {SEED} to draw; give a range, such as rates")
    for axis in axes:
        if axis.field == SEED and isinstance(axis, Range):
            raise ValueError(f"--trials: list the seeds, such as --sweep {SEED}=0,1,2")


def tune(
    config: Config,
    axes: Sequence[Axis | Range],
    session: Session,
    *,
    trials: int,
) -> list[Results]:
    """Train `trials` settings, in generations, each with all seeds that are listed.

    Returns:
      What each generation measured.
    """
    # Slow to import, and an extra.
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Tree-structured Parzen estimators (Bergstra et al., 2011). The first settings are random, for
    # they are asked for before any loss is known.
    sampler = optuna.samplers.TPESampler(seed=config.train.seed, n_startup_trials=GENERATION)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    seeds = _seeds(config, axes)
    # All seeds of a generation's trials train together.
    size = max(min(session.parallel // len(seeds), GENERATION), 1)
    steps = session.loaded.steps(config)
    generations: list[Results] = []
    asked = 0
    while asked < trials:
        count = min(size, trials - asked)
        drawn = [study.ask() for _ in range(count)]
        points = _points(config, axes, drawn, seeds, first=asked * len(seeds))
        results = None
        if session.resume:
            results = _known(points, session.folder, steps)
        if results is None:
            results = _train(points, session, generations)
        generations.append(results)
        _tell(study, drawn, results, steps)
        asked += count
        _print_best(session.console, generations, steps, progress=f"{asked} of {trials} trials")
    return generations


def _print_best(
    console: Console, generations: Sequence[Results], steps: int, *, progress: str
) -> None:
    """Print the best point so far, if any did not diverge."""
    whole = merged(generations)
    best = whole.best(steps)
    if best is None:
        return
    loss = whole.losses[best, steps]
    console.print(f"{progress}: lowest validation loss {loss:.4f} at {whole.points[best].name}")


def _seeds(config: Config, axes: Sequence[Axis | Range]) -> tuple[int, ...]:
    """The seeds that each setting trains with."""
    for axis in axes:
        if isinstance(axis, Axis) and axis.field == SEED:
            return axis.values
    return (config.train.seed,)


def _points(
    config: Config,
    axes: Sequence[Axis | Range],
    drawn: Sequence[Any],
    seeds: Sequence[int],
    *,
    first: int,
) -> list[Point]:
    """The points of the trials, all seeds of a trial one after the other."""
    points: list[Point] = []
    for trial in drawn:
        settings = {}
        for axis in axes:
            # Seeds are no choice of optuna's: it would take the luckiest one.
            if axis.field != SEED:
                settings[axis.field] = _draw(trial, axis)
        for seed in seeds:
            with_seed = {**settings, SEED: seed}
            points.append(make_point(config, with_seed, number=first + len(points)))
    return with_shared_base(points)


def _draw(trial: Any, axis: Axis | Range) -> Any:
    """The value of an axis that a trial draws."""
    if isinstance(axis, Axis):
        # By place, as optuna takes plain values only.
        places = list(range(len(axis.values)))
        place = trial.suggest_categorical(axis.field, places)
        return axis.values[place]
    if axis.is_integer:
        # optuna wants the lowest integer of a logarithmic range to be 1 or more.
        is_log = axis.low >= 1
        return trial.suggest_int(axis.field, int(axis.low), int(axis.high), log=is_log)
    value = trial.suggest_float(axis.field, axis.low, axis.high, log=axis.is_log)
    # Rounding may leave the range.
    return min(max(rounded(value), axis.low), axis.high)


def _tell(study: Any, drawn: Sequence[Any], results: Results, steps: int) -> None:
    """Tell each trial the mean loss of its seeds; infinite where one diverged."""
    seeds = len(results.points) // len(drawn)
    for i, trial in enumerate(drawn):
        # `_points` has put the seeds of a trial side by side.
        members = range(i * seeds, (i + 1) * seeds)
        scores = [results.score(k, steps) for k in members]
        study.tell(trial, float(np.mean(scores)))


def _known(points: Sequence[Point], folder: Path, steps: int) -> Results | None:
    """What results.jsonl holds of a generation; None if a point of it is not at its end."""
    results = Results(points, None)
    results.read(folder)
    is_complete = all(results.has(k, steps) for k in range(len(points)))
    return results if is_complete else None


def _train(points: Sequence[Point], session: Session, earlier: Sequence[Results]) -> Results:
    """Train a generation, and save its best point if it is the best so far."""
    job = set_up(points, session.loaded)
    swept = run_points(
        job,
        session.console,
        folder=session.folder,
        parallel=session.parallel,
        resume=session.resume,
        number=len(earlier),
    )
    best = merged([*earlier, swept.results]).best(job.steps)
    first = sum(len(part.points) for part in earlier)
    # Saved now: the states of a generation are gone when the next one trains.
    if best is not None and best >= first:
        k = best - first
        loss = swept.results.losses[k, job.steps]
        save_best(session, job, swept.state, k, loss=loss)
    return swept.results
