"""Ctrl-C and SIGTERM stop a run after its current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

# Ctrl-C, and what a preempted machine receives before it is shut down.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nstopping after this step, with a checkpoint; a second Ctrl-C stops at once\n"


class StopSignal:
    """Within the block, a first signal requests a stop, and a second raises KeyboardInterrupt.

    With several processes, a SIGTERM to one of them stops all: JAX agrees on the step after which
    they stop.
    """

    def __init__(self) -> None:
        self._requested = False
        self._old_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python allows signal handlers in the main thread only. With several processes, JAX's
        # preemption service handles the signals, and replacing its handler would disable it.
        in_main_thread = threading.current_thread() is threading.main_thread()
        if jax.process_count() == 1 and in_main_thread:
            for number in SIGNALS:
                self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step. Every process calls it once per step."""
        if jax.process_count() == 1:
            return self._requested
        return multihost_utils.reached_preemption_sync_point(step)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        # Not print: the signal may arrive within a print, whose buffer cannot be entered twice.
        os.write(2, NOTICE)
