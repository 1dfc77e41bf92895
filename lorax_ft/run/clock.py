"""The time that a run has trained, and its limit."""

from __future__ import annotations

import time

import jax
import numpy as np
from jax.experimental import multihost_utils


class Clock:
    """Measures the training time of a run.

    Args:
      before: seconds that the run trained before it was resumed.
      max_minutes: the limit for the whole run; None: no limit.
    """

    def __init__(self, before: float, *, max_minutes: float | None) -> None:
        self._start = time.perf_counter() - before
        self._max_minutes = max_minutes

    def seconds(self) -> float:
        """The training time so far."""
        return time.perf_counter() - self._start

    def is_over(self) -> bool:
        """Whether the limit is reached. Every process calls it once per step."""
        if self._max_minutes is None:
            return False
        over = self.seconds() >= 60 * self._max_minutes
        if jax.process_count() == 1:
            return over
        # The clocks differ, so the first process decides: all must stop after the same step.
        return bool(multihost_utils.broadcast_one_to_all(np.array(over)))
