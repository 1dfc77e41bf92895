"""A run that is told to stop ends after its step, so that nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a machine sends before it goes away
NOTICE = b"\nending after this step, with a checkpoint; once more to end at once\n"


class StopSignal:
    """Inside the block, the first signal asks for the end; a second one is a KeyboardInterrupt at once.

    Of several processes, a SIGTERM to any asks all of them, and JAX finds the step that all can end after.
    """

    def __init__(self) -> None:
        self._asked = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        # Outside the main thread signals cannot be had, and of several processes they are JAX's.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def asked(self, step: int) -> bool:
        """Whether the run is to end after this step; called once at each."""
        return (
            self._asked
            if jax.process_count() == 1
            else multihost_utils.reached_preemption_sync_point(step)
        )

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        os.write(2, NOTICE)  # as a handler may not print
