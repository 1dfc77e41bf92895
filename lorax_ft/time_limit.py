"""Stops Python code that runs too long, in any thread.

A signal would do this in the main thread of a Unix process only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import time
from collections.abc import Iterator

_TICK = 0.25


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the code inside, if it runs for more than about `seconds`.

    It interrupts Python code, also endless loops; not a single call into C.
    """
    thread = threading.get_ident()
    watchdog = _watchdog()
    watchdog.watch(thread, seconds)
    try:
        yield
    finally:
        watchdog.release(thread)


class _Watchdog(threading.Thread):
    """Raises TimeoutError in the threads whose deadline has passed.

    One thread serves all limits: starting one for each of 100,000 conversations would take longer
    than rendering them.
    """

    def __init__(self) -> None:
        super().__init__(name="lorax_ft time limits", daemon=True)
        self._changed = threading.Condition()
        self._deadlines: dict[int, float] = {}

    def watch(self, thread: int, seconds: float) -> None:
        with self._changed:
            self._deadlines[thread] = time.monotonic() + seconds
            self._changed.notify()

    def release(self, thread: int) -> None:
        with self._changed:
            self._deadlines.pop(thread, None)

    def run(self) -> None:
        while True:
            with self._changed:
                while not self._deadlines:
                    self._changed.wait()
                now = time.monotonic()
                for thread, deadline in list(self._deadlines.items()):
                    if deadline < now:
                        del self._deadlines[thread]
                        _raise_timeout(thread)
            time.sleep(_TICK)


@functools.cache
def _watchdog() -> _Watchdog:
    watchdog = _Watchdog()
    watchdog.start()
    return watchdog


def _raise_timeout(thread: int) -> None:
    # CPython raises it at the thread's next Python instruction.
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(TimeoutError)
    )
