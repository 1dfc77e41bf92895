"""A watchdog that ends the process when a training step hangs.

A device or another process that never answers leaves Python waiting in C, where no exception can
be raised. So the timer is faulthandler's: a thread in C that needs neither Python's lock nor its
signals. It prints where each thread is, and ends the process with status 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator

FIRST = 4
"""Blocks that may take longer: in the first two steps devices meet and programs load."""
LONGER = 10.0
"""How many times as long."""
STDERR = 2


class Watchdog:
    """Ends the process if a watched block takes too long.

    Args:
      seconds: how long a block may take; None: nothing is watched.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._first = FIRST

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the block. Blocks follow one another, and do not contain one another."""
        if self._seconds is None:
            yield
            return
        seconds = self._seconds
        if self._first:
            self._first -= 1
            seconds *= LONGER
        # By its number: a notebook replaces sys.stderr by an object without a file.
        faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
