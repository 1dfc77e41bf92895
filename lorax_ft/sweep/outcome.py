"""What a sweep leaves behind: table, plot, and the best point as config file and adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from lorax_ft.interop.peft import BASE, save_peft
from lorax_ft.interop.save import save_quantized
from lorax_ft.lowrank.requantize import is_requantized
from lorax_ft.run.report import print_summary
from lorax_ft.run.training_notes import training_notes
from lorax_ft.sweep.axes import Point, describe
from lorax_ft.sweep.config_file import config_file
from lorax_ft.sweep.display import points_table
from lorax_ft.sweep.folder import ADAPTER, BEST, PLOT
from lorax_ft.sweep.plot import plot_sweep
from lorax_ft.sweep.results import RESULTS, Results
from lorax_ft.sweep.setup import SweepJob
from lorax_ft.training.step import TrainState
from lorax_ft.tree import modules


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


def save_best(
    job: SweepJob,
    state: TrainState,
    k: int,
    folder: Path,
    *,
    loss: float,
    command: str | None,
) -> None:
    """Write best.py and the adapter of a point."""
    point = job.points[k]
    if jax.process_index() != 0:
        return
    heading = (
        f"The best point of a sweep: {point.name}.\n\n"
        f"    python scripts/train.py --config {folder / BEST}\n\n"
        f"Validation loss {loss:.4f} after {job.steps} steps.\n"
    )
    (folder / BEST).write_text(config_file(point.config, docstring=heading))
    adapter = point.config.adapter
    # The weights of full fine-tuning are no adapter; best.py trains them again.
    if not adapter.targets:
        return
    params = job.params(state, k)
    base = None
    # No other checkpoint holds kernels that the init quantized anew.
    if any(is_requantized(layer) for layer in modules(params).values()):
        base = folder / BASE
        if not base.is_dir():
            save_quantized(base, params, job.model)
    notes = training_notes(
        point.config,
        job.model,
        job.data[k],
        steps=f"{job.steps}, as one of {len(job.points)} adapters of a sweep",
        results={"sweep": point.name, "validation loss": f"{loss:.4f}"},
        command=command,
    )
    save_peft(
        folder / ADAPTER,
        params,
        job.model,
        config=adapter,
        base=base,
        others="keep",
        training_notes=notes,
    )


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
        ("config", f"{folder / BEST} for scripts/train.py --config"),
        ("adapter", str(folder / ADAPTER)),
        ("results", f"{folder / RESULTS}, {folder / PLOT}"),
        ("time", f"{seconds:.0f} s"),
    ]
    if not point.config.adapter.targets:
        rows.pop(2)
    print_summary(console, rows, title="Sweep")
    return SweepResult(
        folder=folder,
        best=point,
        loss=loss,
        losses={its.name: _last_loss(results, k) for k, its in enumerate(results.points)},
        steps=steps,
        seconds=seconds,
    )


def merged(parts: Sequence[Results]) -> Results:
    """The results of several generations as one."""
    points = [point for part in parts for point in part.points]
    whole = Results(points, None)
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


def _last_loss(results: Results, k: int) -> float:
    step, _ = results.last(k) or (0, 0.0)
    return results.score(k, step)
