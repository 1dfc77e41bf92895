"""A sweep from its config to the best adapter: what `lorax-ft sweep` calls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lorax_ft import program
from lorax_ft.config import Config
from lorax_ft.run import report
from lorax_ft.run.folder import check_writable
from lorax_ft.run.lock import locked
from lorax_ft.sweep.agree import check_axes, check_config, with_shared_base
from lorax_ft.sweep.axes import Axis, Point, Range, parse_axes, product
from lorax_ft.sweep.folder import check_sweep_folder, make_sweep_folder, sweep_folder
from lorax_ft.sweep.halving import Budget
from lorax_ft.sweep.loop import run_points
from lorax_ft.sweep.outcome import SweepResult, finish, save_best
from lorax_ft.sweep.results import Results
from lorax_ft.sweep.session import Session
from lorax_ft.sweep.setup import SweepJob, load, set_up
from lorax_ft.sweep.tune import check_tuning, tune

PARALLEL = 16
"""Adapters that train together, at most, by default."""


def sweep(
    config: Config,
    entries: Sequence[str],
    *,
    parallel: int = PARALLEL,
    budget: Budget = "full",
    trials: int = 0,
    command: str | None = None,
) -> SweepResult:
    """Train a config at many settings, all in one program over one base.

    Args:
      config: what all points share; train.output names the folder, with "-sweep" behind it, and
        train.resume and train.overwrite are about that folder.
      entries: what varies, such as "optim.learning_rate=1e-4,1e-3" (`parse_axes`).
      parallel: adapters that train together, at most; more of them train in groups.
      budget: "halve" drops the worse half of the settings after equal shares of the steps.
      trials: settings that optuna draws from the ranges and lists; 0: all combinations of lists.
      command: the command line that started the sweep, for the model card.

    Returns:
      The best point. Its config lies in best.py, its adapter in adapter/.

    Raises:
      ValueError: bad input, several processes, or all points diverged.
      OSError: the disk is full.
      KeyboardInterrupt: a signal ended the sweep, after a checkpoint.
    """
    # Its files are written by one process.
    if jax.process_count() > 1:
        raise ValueError(
            f"a sweep runs in one process, and here are {jax.process_count()}; start it on one "
            f"host, or train its points as runs with {program.command('train')} --multihost"
        )
    axes = _checked_axes(config, entries, parallel=parallel, budget=budget, trials=trials)
    folder = sweep_folder(config)
    # With trials, optuna draws the points while the sweep runs.
    points = [] if trials else _all_points(_config_of_runs(config), axes)
    options = {"sweep": list(entries), "parallel": parallel, "budget": budget, "trials": trials}
    check_writable(folder)
    with locked(folder):
        return _sweep(config, axes, points, folder, options, command=command)


def _sweep(
    config: Config,
    axes: Sequence[Axis | Range],
    points: list[Point],
    folder: Path,
    options: dict[str, Any],
    *,
    command: str | None,
) -> SweepResult:
    """As `sweep`, in a folder that is locked."""
    start_time = time.perf_counter()
    parallel, budget, trials = options["parallel"], options["budget"], options["trials"]
    resume = check_sweep_folder(folder, config, options)
    console = report.make_console()
    report.print_config(console, config)
    _print_axes(console, axes, points=len(points), trials=trials, parallel=parallel)
    session = Session(
        loaded=load(config),
        console=console,
        folder=folder,
        parallel=parallel,
        resume=resume,
        command=command,
    )
    if trials:
        make_sweep_folder(folder, config, options, resume=resume)
        generations = tune(_config_of_runs(config), axes, session, trials=trials)
        steps = session.loaded.steps(config)
    else:
        job = set_up(points, session.loaded)
        _print_job(console, job)
        # A sweep that fails in its setup must not delete the one that it overwrites.
        make_sweep_folder(folder, config, options, resume=resume)
        generations = [_train(job, session, budget)]
        steps = job.steps
    seconds = time.perf_counter() - start_time
    return finish(console, folder, generations, steps=steps, seconds=seconds)


def _checked_axes(
    config: Config, entries: Sequence[str], *, parallel: int, budget: Budget, trials: int
) -> list[Axis | Range]:
    """What varies, after all checks that need no model."""
    axes = parse_axes(entries)
    check_axes(axes)
    check_config(config, axes)
    _check_options(axes, parallel=parallel, budget=budget, trials=trials)
    return axes


def _config_of_runs(config: Config) -> Config:
    """The config of the sweep's runs, which do not have its folder."""
    # Resuming and overwriting are about the sweep's folder, and not about its points' runs.
    train = dataclasses.replace(config.train, resume="auto", overwrite=False)
    return dataclasses.replace(config, train=train)


def _all_points(config: Config, axes: Sequence[Axis | Range]) -> list[Point]:
    """The points of all combinations of the axes' values."""
    # `_check_options` has made sure that no axis is a range.
    lists = [axis for axis in axes if isinstance(axis, Axis)]
    return with_shared_base(product(config, lists))


def _train(job: SweepJob, session: Session, budget: Budget) -> Results:
    """Train all points as one generation, and save the best one."""
    swept = run_points(
        job,
        session.console,
        folder=session.folder,
        parallel=session.parallel,
        budget=budget,
        resume=session.resume,
    )
    results = swept.results
    best = results.best(job.steps)
    # Where all diverged there is no best one; `finish` says so, after the table.
    if best is not None:
        loss = results.losses[best, job.steps]
        save_best(session, job, swept.state, best, loss=loss)
    return results


def _check_options(
    axes: Sequence[Axis | Range], *, parallel: int, budget: Budget, trials: int
) -> None:
    """Raise if options do not fit together."""
    if parallel < 1:
        raise ValueError(f"--parallel is {parallel}; it must be 1 or more")
    if trials < 0:
        raise ValueError(f"--trials is {trials}; it must be 0 or more")
    if trials:
        check_tuning(axes, budget)
        return
    # Without an optimizer that draws from it, a range has no end of values.
    for axis in axes:
        if isinstance(axis, Range):
            text = f"{axis.field}={axis.low:g}..{axis.high:g}"
            raise ValueError(
                f"--sweep {text} is a range; give --trials N to draw from it, or a number of "
                f"values: {text}:8"
            )


def _print_axes(
    console: Console, axes: Sequence[Axis | Range], *, points: int, trials: int, parallel: int
) -> None:
    """Print what varies, and how many adapters there are."""
    parts = []
    for axis in axes:
        if isinstance(axis, Axis):
            parts.append(f"{len(axis.values)} of {axis.field}")
        else:
            parts.append(f"{axis.field} from {axis.low:g} to {axis.high:g}")
    count = f"{trials} trials" if trials else f"{points} points"
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    console.print(
        f"\nSweep of {count}: {' × '.join(parts)}; at most {parallel} adapters at a time, "
        f"on {devices}\n"
    )


def _print_job(console: Console, job: SweepJob) -> None:
    """Print the memory of the adapters beside that of the base."""
    base = _megabytes(job.base)
    adapters = _megabytes((job.state, job.owned))
    console.print(
        f"{job.steps} steps each. The base takes {base:,.1f} MB, the "
        f"{len(job.points)} adapters with their optimizer states {adapters:,.1f} MB."
    )


def _megabytes(tree: Any) -> float:
    """The memory of a tree's leaves over all devices."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.nbytes for leaf in leaves) / 1e6
