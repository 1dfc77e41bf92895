"""Bounds how much memory a piece of Python code may ask for.

Linux only: other systems do not heed the limit, and there is none.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_STATM = Path("/proc/self/statm")
_lock = threading.Lock()
_inside = 0
_before = (-1, -1)
"""The limits of the process, soft and hard, before the first caller set one."""


@contextlib.contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Raises MemoryError in the code inside where the process would grow by `extra` bytes.

    The limit is one of the process: other threads share it, and the first of several callers at
    once sets it. Costs some 10 microseconds.
    """
    if sys.platform != "linux":
        yield
        return
    _enter(extra)
    try:
        yield
    finally:
        _leave()


def _enter(extra: int) -> None:
    import resource  # Windows has none

    global _inside, _before
    with _lock:
        _inside += 1
        if _inside > 1:
            return
        _before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(_STATM.read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + extra
        soft, hard = _before
        if soft == resource.RLIM_INFINITY or limit < soft:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _leave() -> None:
    import resource

    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            resource.setrlimit(resource.RLIMIT_AS, _before)
