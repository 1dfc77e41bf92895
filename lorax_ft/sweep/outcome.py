"""What a sweep leaves behind: table, plot, and the best point as config file and adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from lorax_ft.config import Config
from lorax_ft.config.python_file import config_file
from lorax_ft.files import write_file
from lorax_ft.interop.peft import save_peft
from lorax_ft.interop.peft_checks import BASE
from lorax_ft.interop.save import save_quantized
from lorax_ft.lowrank.requantize import is_requantized
from lorax_ft.models.model import Model
from lorax_ft.program import command
from lorax_ft.run.report import print_summary
from lorax_ft.run.training_notes import training_notes
from lorax_ft.sweep.axes import Point, describe
from lorax_ft.sweep.display import points_table
from lorax_ft.sweep.folder import ADAPTER, BEST, PLOT
from lorax_ft.sweep.plot import plot_sweep
from lorax_ft.sweep.results import RESULTS, Results
from lorax_ft.sweep.session import Session
from lorax_ft.sweep.setup import SweepJob
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, modules


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The result of a sweep."""

    folder: Path
    best: Point
    loss: float
    """The validation loss of the best point."""
    losses: dict[str, float]
    """The last validation loss of each point, by its settings in words; infinite: it diverged."""
    steps: int
    seconds: float


def save_best(session: Session, job: SweepJob, state: TrainState, k: int, *, loss: float) -> None:
    """Write best.py and the adapter of a point."""
    # One process writes, as all have the same results.
    if jax.process_index() != 0:
        return
    point = job.points[k]
    folder = session.folder
    heading = (
        f"The best point of a sweep: {point.name}.\n\n"
        f"    {command('train')} --config {folder / BEST}\n\n"
        f"Validation loss {loss:.4f} after {job.steps} steps.\n"
    )
    write_file(folder / BEST, config_file(point.config, docstring=heading))
    # The weights of full fine-tuning are no adapter; best.py trains them again.
    if _trains_the_model(point.config):
        return
    params = job.params(state, k)
    notes = training_notes(
        point.config,
        job.model,
        job.data[k],
        steps=f"{job.steps}, as one of {len(job.points)} adapters of a sweep",
        results={"sweep": point.name, "validation loss": f"{loss:.4f}"},
        command=session.command,
    )
    # others="keep": what a user has put beside an earlier best adapter stays.
    save_peft(
        folder / ADAPTER,
        params,
        job.model,
        config=point.config.adapter,
        base=_save_base(folder, params, job.model),
        others="keep",
        training_notes=notes,
    )


def _save_base(folder: Path, params: Tree, model: Model) -> Path | None:
    """Save the base if the init quantized its kernels anew, for no other checkpoint holds them.

    Returns:
      Its folder; None if the adapter belongs to the model that was loaded.
    """
    if not any(is_requantized(layer) for layer in modules(params).values()):
        return None
    base = folder / BASE
    # All points share the base, so that of an earlier best one is the same.
    if not base.is_dir():
        save_quantized(base, params, model)
    return base


def finish(
    console: Console,
    folder: Path,
    generations: Sequence[Results],
    *,
    steps: int,
    seconds: float,
) -> SweepResult:
    """Print the table, save the plot, and name the best point.

    Args:
      console: where to print.
      folder: of the sweep.
      generations: what it measured.
      steps: the steps of a point.
      seconds: what the sweep took.

    Raises:
      ValueError: all points diverged.
    """
    results = merged(generations)
    best = results.best(steps)
    if best is None:
        raise ValueError("all points of the sweep diverged; lower optim.learning_rate")
    console.print(points_table(results, width=console.width, best=best))
    point = results.points[best]
    loss = results.losses[best, steps]
    if jax.process_index() == 0:
        plot_sweep(results, folder / PLOT, steps=steps, title=folder.name)
    rows = [
        ("best", f"{describe(point.settings)}: validation loss {loss:.4f}"),
        ("config", f"{folder / BEST} for {command('train')} --config"),
    ]
    # Full fine-tuning leaves no adapter (`save_best`).
    if not _trains_the_model(point.config):
        rows.append(("adapter", str(folder / ADAPTER)))
    rows += [
        ("results", f"{folder / RESULTS}, {folder / PLOT}"),
        ("time", f"{seconds:.0f} s"),
    ]
    print_summary(console, rows, title="Sweep")
    losses = {}
    for k, its in enumerate(results.points):
        losses[its.name] = _last_loss(results, k)
    return SweepResult(
        folder=folder,
        best=point,
        loss=loss,
        losses=losses,
        steps=steps,
        seconds=seconds,
    )


def merged(parts: Sequence[Results]) -> Results:
    """The results of several generations as one."""
    points: list[Point] = []
    for part in parts:
        points += part.points
    whole = Results(points, None)
    # Each part counts its points from 0; in the whole they follow those of the parts before.
    first = 0
    for part in parts:
        for (k, step), loss in part.losses.items():
            whole.losses[first + k, step] = loss
        for k, step in part.diverged.items():
            whole.diverged[first + k] = step
        for k, step in part.dropped.items():
            whole.dropped[first + k] = step
        for k, loss in part.trained.items():
            whole.trained[first + k] = loss
        first += len(part.points)
    return whole


def _trains_the_model(config: Config) -> bool:
    """Whether a run saves a model and not an adapter."""
    return "all" in config.adapter.train_whole and not config.adapter.targets


def _last_loss(results: Results, k: int) -> float:
    step, _ = results.last(k) or (0, 0.0)
    return results.score(k, step)
