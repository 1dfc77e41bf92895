"""Ctrl-C, SIGTERM and SIGHUP stop a run, with a checkpoint if it has made steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

# Ctrl-C, what a preempted machine receives before it is shut down, and the end of a terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICE = b"\nstopping after this step, with a checkpoint; a second Ctrl-C stops at once\n"


class Interrupted(KeyboardInterrupt):
    """A first signal, where the run can stop at once."""


class StopSignal:
    """Within the block, a signal raises `Interrupted`; while training, it only requests a stop.

    A second signal always raises KeyboardInterrupt. With several processes, a SIGTERM to one of
    them stops all while they train: JAX agrees on the step after which they stop.
    """

    def __init__(self) -> None:
        self._requested = False
        self._waits = False
        self._old_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python allows signal handlers in the main thread only. With several processes, JAX's
        # preemption service handles the signals, and replacing its handler would disable it.
        in_main_thread = threading.current_thread() is threading.main_thread()
        if jax.process_count() > 1 or not in_main_thread:
            return self
        for number in SIGNALS:
            # nohup and background jobs ignore signals, on purpose.
            if signal.getsignal(number) is not signal.SIG_IGN:
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

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block, a first signal only requests a stop (`requested`)."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, which lies in one that waits, a first signal raises `Interrupted`."""
        self._waits = False
        try:
            if self._requested:
                raise Interrupted
            yield
        finally:
            self._waits = True

    def requested(self, step: int) -> bool:
        """Whether to stop after this step. Every process calls it once per step."""
        if jax.process_count() == 1:
            return self._requested
        return multihost_utils.reached_preemption_sync_point(step)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        if not self._waits:
            raise Interrupted("interrupted; the same command goes on with the run")
        # Not print: the signal may arrive within a print, whose buffer cannot be entered twice.
        os.write(2, NOTICE)
