"""Progress of a run: a bar on a terminal, and a few lines in a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console

LINES = 20
"""How many lines a run prints if its output is not a terminal."""

WIDE = 80
"""Columns from which on a bar shows the learning rate."""
NARROW = 60
"""Columns from which on there is a bar, with the tokens per second."""


class Progress:
    """Shows the loss, the learning rate, tokens per second and the time left.

    Args:
      console: where to print.
      first: steps that are already done.
      steps: all steps of the run.
    """

    def __init__(self, console: Console, *, first: int, steps: int) -> None:
        self._console = console
        self._first = first
        self._steps = steps
        columns: list[rich_progress.ProgressColumn] = [
            rich_progress.TextColumn("step {task.completed}/{task.total}"),
            rich_progress.TextColumn("{task.description}"),
            rich_progress.TimeRemainingColumn(),
        ]
        if console.width >= NARROW:
            columns.insert(1, rich_progress.BarColumn(bar_width=None))
        self._bar = rich_progress.Progress(
            *columns,
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiled", total=steps, completed=first)
        self._last = time.perf_counter()
        self._tokens_per_second = 0.0  # smoothed
        self._tokens = 0
        self._seconds = 0.0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(
        self, step: int, metrics: Mapping[str, float], tokens: int, skipped: int = 0
    ) -> float:
        """Show that `step` is done. Returns the tokens per second since the last step.

        Args:
          step: the step.
          metrics: its metrics.
          tokens: its tokens without padding.
          skipped: steps of the run so far that were skipped.
        """
        now = time.perf_counter()
        seconds = max(now - self._last, 1e-9)
        tokens_per_second = tokens / seconds
        self._tokens += tokens
        self._seconds += seconds
        self._last = now
        if step <= self._first + 2:
            # The first step warms up, so the average starts anew with the second.
            self._tokens_per_second = tokens_per_second
        else:
            self._tokens_per_second = 0.9 * self._tokens_per_second + 0.1 * tokens_per_second
        # Groups of leaves have learning rates of their own (LoRA+); the largest stands for all.
        learning_rate = max(v for name, v in metrics.items() if name.startswith("learning_rate"))
        parts = [f"loss {metrics['loss']:.4f}"]
        # rich would cut the numbers that do not fit beside the bar.
        if self._console.width >= WIDE:
            parts.append(f"lr {learning_rate:.2e}")
        if self._console.width >= NARROW:
            parts.append(f"{self._tokens_per_second:,.0f} tokens/s")
        if skipped:
            parts.append(f"{skipped:,} skipped")
        text = "  ".join(parts)
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and self._prints_line(step):
            seconds_left = (self._steps - step) * tokens / max(self._tokens_per_second, 1e-9)
            self._console.print(f"step {step}/{self._steps}  {text}  {seconds_left:.0f} s left")
        return tokens_per_second

    @property
    def mean_tokens_per_second(self) -> float:
        """Over all steps so far, without evaluations and checkpoints; 0 before the first step."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def skip(self) -> None:
        """Exclude the time since the last step (an evaluation, a checkpoint) from the next one."""
        self._last = time.perf_counter()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text)

    def _prints_line(self, step: int) -> bool:
        """Whether a run without a terminal prints a line after this step."""
        every = max(self._steps // LINES, 1)
        return step % every == 0 or step == self._steps


@contextlib.contextmanager
def progress_bar(console: Console, description: str) -> Iterator[Callable[[float], None]]:
    """A bar for a part of the setup. Yields a function to call with each completed fraction."""
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=None),
        rich_progress.TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with rich_progress.Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task(description, total=1.0)
        yield lambda fraction: bar.advance(task, fraction)
