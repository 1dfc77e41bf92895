"""The progress of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

from rich import progress as bars
from rich.console import Console

LINES = 20  # lines of a run whose output goes to a file


class Progress:
    """Loss, learning rate, tokens a second and the time left.

    Args:
      console: where to.
      first: steps done before.
      steps: steps in all.
    """

    def __init__(self, console: Console, *, first: int, steps: int) -> None:
        self._console, self._first, self._steps = console, first, steps
        self._bar = bars.Progress(
            bars.TextColumn("step {task.completed}/{task.total}"),
            bars.BarColumn(bar_width=None),
            bars.TextColumn("{task.description}"),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("compiled", total=steps, completed=first)
        self._last = time.perf_counter()
        self._rate = 0.0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, values: Mapping[str, float], tokens: int) -> float:
        """Show that `step` is done; returns the tokens a second since the step before."""
        now = time.perf_counter()
        rate, self._last = tokens / max(now - self._last, 1e-9), now
        self._rate = rate if step <= self._first + 2 else 0.9 * self._rate + 0.1 * rate
        peak = max(value for name, value in values.items() if name.startswith("learning_rate"))
        text = f"loss {values['loss']:.4f}  rate {peak:.2e}  {self._rate:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, description=text)
        if not self._console.is_terminal and (
            step % max(self._steps // LINES, 1) == 0 or step == self._steps
        ):
            left = (self._steps - step) * tokens / max(self._rate, 1e-9)
            self._console.print(f"step {step}/{self._steps}  {text}  {left:.0f} s left")
        return rate

    def skip(self) -> None:
        """Leave out of the next step's time what passed since the last."""
        self._last = time.perf_counter()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text)


@contextlib.contextmanager
def working(console: Console, what: str) -> Iterator[Callable[[float], None]]:
    """A bar for a part of the start; gives the function to call with each share that is done."""
    shown = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=None),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(
        *shown, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.advance(task, share)
