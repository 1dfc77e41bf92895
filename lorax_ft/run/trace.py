"""A profile of a few training steps by jax.profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

PROFILE = "profile"
"""The folder of the trace in a run's output folder."""
SKIPPED = 2
"""Steps before the trace: the first ones warm up, and check that the adapters move."""


class Trace:
    """Within the block, records `steps` steps after the first two, if there are so many.

    Args:
      folder: where to write; None: this process writes nothing.
      steps: how many; 0: none.
    """

    def __init__(self, folder: Path | None, *, steps: int) -> None:
        self._folder = folder
        self._left = steps if folder is not None else 0
        self._skipped = 0
        self._running = False

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def after_step(self, metrics: Any) -> None:
        """Count a step that was given to the device, and start or end the trace there."""
        if self._left == 0:
            return
        if self._running:
            self._left -= 1
            if self._left > 0:
                return
        else:
            self._skipped += 1
            if self._skipped < SKIPPED:
                return
        # The device may still be computing: the trace holds whole steps only.
        jax.block_until_ready(metrics)
        if self._running:
            self._stop()
        else:
            assert self._folder is not None
            jax.profiler.start_trace(str(self._folder / PROFILE))
            self._running = True

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
