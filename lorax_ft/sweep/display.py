"""What a sweep shows: a live table of its points on a terminal, a few lines in a file."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lorax_ft.run.progress import LINES, WIDE
from lorax_ft.run.report import make_table
from lorax_ft.sweep.axes import describe_value
from lorax_ft.sweep.results import Results

MOST_ROWS = 24
"""Points that the live table shows, the best ones."""
MEASURED = ("step", "training loss", "validation loss")
"""Columns of the table of points."""


class Display:
    """Shows the points of a sweep while they train.

    Args:
      console: where to print.
      results: what is shown.
      done: updates of adapters that are done, over all points.
      total: updates of adapters of the whole sweep.
    """

    def __init__(self, console: Console, results: Results, *, done: int, total: int) -> None:
        self._console = console
        self._results = results
        self._last = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), TimeRemainingColumn()
        )
        self._task = self._bar.add_task("", total=total, completed=done)
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=2, transient=True
        )

    def __enter__(self) -> Display:
        # A file gets lines of text: a live table would fill it with control characters.
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def advance(self, step: int, steps: int, members: Sequence[int], tokens: int) -> None:
        """Show that the members have done a step."""
        now = time.perf_counter()
        # Two outputs may be fetched in a row, faster than the clock ticks.
        speed = tokens / max(now - self._last, 1e-9)
        self._last = now
        text = f"step {step}/{steps}  {_count(members)}  {speed:,.0f} tokens/s"
        self._bar.update(self._task, advance=len(members), description=text)
        if self._console.is_terminal:
            return
        every = max(steps // LINES, 1)
        if step % every == 0 or step == steps:
            losses = [self._results.trained.get(k, math.nan) for k in members]
            # Those that diverged would hide how the others do.
            finite = list(filter(math.isfinite, losses))
            if finite:
                text += f"  loss {min(finite):.4f} to {max(finite):.4f}"
            self._console.print(text)

    def skip(self) -> None:
        """Exclude the time since the last step from the speed of the next one."""
        self._last = time.perf_counter()

    def evaluated(self, step: int, members: Sequence[int]) -> None:
        """Show the validation losses of the members at a step."""
        self.skip()
        if self._console.is_terminal:
            return
        best = min(members, key=lambda k: self._results.score(k, step))
        loss = self._results.score(best, step)
        # Infinite if all of them diverged, of which `diverged` tells.
        if math.isfinite(loss):
            point = self._results.points[best]
            self._console.print(f"step {step}: lowest validation loss {loss:.4f} at {point.name}")

    def diverged(self, members: Sequence[int]) -> None:
        """Print which points diverged."""
        for k in members:
            point, step = self._results.points[k], self._results.diverged[k]
            self._console.print(f"{point.name}: diverged at step {step}", style="yellow")

    def dropped(self, step: int, members: Sequence[int]) -> None:
        """Print that the worse half was dropped."""
        self._console.print(f"step {step}: {_count(members)} with the higher losses dropped")

    def _render(self) -> RenderableType:
        # The title, the header, its rule, the bar and the lines around them take up to 8 lines.
        rows = min(MOST_ROWS, max(self._console.height - 8, 1))
        table = points_table(self._results, width=self._console.width, most=rows)
        return Group(table, self._bar)


def points_table(
    results: Results, *, width: int, best: int | None = None, most: int | None = None
) -> Table:
    """The table of the points, the best ones first.

    Args:
      results: what was measured so far.
      width: of the terminal. A narrow one shows the settings and the validation loss only.
      best: the point to mark; None: the first one.
      most: the number of rows; None: all.
    """
    order = sorted(range(len(results.points)), key=lambda k: _rank(results, k))
    if best is None:
        best = order[0]
    measured = MEASURED if width >= WIDE else MEASURED[-1:]
    table = make_table(f"{_count(order)}, the lowest validation loss first")
    fields = list(results.points[0].settings)
    for header in _headers(fields):
        table.add_column(header, overflow="fold")
    for name in measured:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for k in order[:most]:
        settings = results.points[k].settings
        cells = [describe_value(settings[field]) for field in fields]
        numbers = _measured(results, k)
        cells += [numbers[name] for name in measured]
        table.add_row(*cells, _status(results, k, best))
    return table


def _headers(fields: Sequence[str]) -> list[str]:
    """The names of fields without their sections, where that is unique."""
    last_parts = [field.rpartition(".")[2] for field in fields]
    headers = []
    for field, last in zip(fields, last_parts, strict=True):
        headers.append(last if last_parts.count(last) == 1 else field)
    return headers


def _measured(results: Results, k: int) -> dict[str, str]:
    """The cells of a point in the columns `MEASURED`."""
    cells = dict.fromkeys(MEASURED, "")
    step_column, train_column, validation_column = MEASURED
    if k in results.trained:
        cells[train_column] = f"{results.trained[k]:.4f}"
    last = results.last(k)
    if last is not None:
        step, loss = last
        cells[step_column] = str(step)
        cells[validation_column] = f"{loss:.4f}"
    return cells


def _status(results: Results, k: int, best: int) -> str:
    """What became of a point, in words."""
    if k in results.diverged:
        return f"diverged at {results.diverged[k]}"
    if k in results.dropped:
        return f"dropped at {results.dropped[k]}"
    return "best" if k == best else ""


def _rank(results: Results, k: int) -> tuple[bool, int, float]:
    """The order of the table: those that trained for longer first, then by loss."""
    step, loss = results.last(k) or (0, math.inf)
    is_diverged = k in results.diverged or not math.isfinite(loss)
    # False sorts before True, and the larger step first.
    return is_diverged, -step, loss


def _count(members: Sequence[int]) -> str:
    return "1 adapter" if len(members) == 1 else f"{len(members)} adapters"
