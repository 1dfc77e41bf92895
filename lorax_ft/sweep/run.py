"""A sweep from its config to the best adapter: what `scripts/sweep.py` calls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.run import report
from lorax_ft.sweep.agree import check_axes, check_config, with_shared_base
from lorax_ft.sweep.axes import Axis, Range, parse_axes, product
from lorax_ft.sweep.folder import check_sweep_folder, make_sweep_folder, sweep_folder
from lorax_ft.sweep.halving import Budget
from lorax_ft.sweep.loop import run_points
from lorax_ft.sweep.outcome import SweepResult, finish, save_best
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
      ValueError: bad input, or all points diverged.
      OSError: the disk is full.
      KeyboardInterrupt: a signal ended the sweep, after a checkpoint.
    """
    start_time = time.perf_counter()
    axes = parse_axes(entries)
    check_axes(axes)
    check_config(config, axes)
    _check_options(axes, parallel=parallel, budget=budget, trials=trials)
    lists = [axis for axis in axes if isinstance(axis, Axis)]
    folder = sweep_folder(config)
    options = {
        "sweep": list(entries),
        "parallel": parallel,
        "budget": budget,
        "trials": trials,
    }
    # Resuming and overwriting are about the sweep's folder, and not about its points' runs.
    train = dataclasses.replace(config.train, resume=False, overwrite=False)
    run_config = dataclasses.replace(config, train=train)
    points = [] if trials else with_shared_base(product(run_config, lists))
    check_sweep_folder(folder, config, options)

    console = report.make_console()
    report.print_config(console, config)
    _print_axes(console, axes, points=len(points), trials=trials, parallel=parallel)
    loaded = load(config)
    if trials:
        make_sweep_folder(folder, config, options)
        generations = tune(
            run_config,
            axes,
            loaded,
            console,
            folder=folder,
            trials=trials,
            parallel=parallel,
            resume=config.train.resume,
            command=command,
        )
        steps = loaded.steps(config)
    else:
        job = set_up(points, loaded)
        _print_job(console, job)
        # A sweep that fails in its setup must not delete the one that it overwrites.
        make_sweep_folder(folder, config, options)
        one = run_points(
            job,
            console,
            folder=folder,
            parallel=parallel,
            budget=budget,
            resume=config.train.resume,
        )
        steps = job.steps
        best = one.results.best(steps)
        if best is not None:
            loss = one.results.losses[best, steps]
            save_best(job, one.state, best, folder, loss=loss, command=command)
        generations = [one.results]
    seconds = time.perf_counter() - start_time
    return finish(console, folder, generations, steps=steps, seconds=seconds)


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
    adapters = sum(leaf.nbytes for leaf in jax.tree.leaves((job.state, job.owned)))
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(job.base))
    console.print(
        f"{job.steps} steps each. The base takes {base / 1e6:,.1f} MB, the "
        f"{len(job.points)} adapters with their optimizer states {adapters / 1e6:,.1f} MB."
    )
