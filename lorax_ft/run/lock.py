"""A lock on the output folder, so that two runs do not write into one.

The kernel releases the lock when its process ends, however it ends. On a bucket there is no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from lorax_ft.files import named_errors
from lorax_ft.interop.bucket import is_remote

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder within the block, and make the folder if it is missing.

    The first of several processes holds it for all. A folder that is made and stays empty is
    deleted again.

    Args:
      folder: the output folder; on a bucket nothing is locked.

    Raises:
      ValueError: another run holds the lock.
    """
    held: Lock | None = None
    problem = ""
    if jax.process_index() == 0 and not is_remote(folder):
        held = Lock(folder)
        problem = held.acquire()
    if jax.process_count() > 1:
        refused = bool(multihost_utils.broadcast_one_to_all(bool(problem)))
        problem = problem or ("another run writes to the output folder" if refused else "")
    if problem:
        raise ValueError(f"{problem}; wait for its end, or use another --train.output")
    try:
        yield
    finally:
        if held is not None:
            held.release()


class Lock:
    """The lock of a folder: `flock` on a file in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / LOCK
        self._made = _missing(folder)
        self._descriptor: int | None = None

    def acquire(self) -> str:
        """Take the lock. Returns what is in the way; empty if it was taken."""
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                return f"another run ({holder}) writes to {self._folder}"
            except OSError as error:  # some network file systems have no locks
                warnings.warn(
                    f"{self._folder} cannot be locked ({error.strerror}): make sure that no other "
                    "run writes to it",
                    stacklevel=3,
                )
            if self._is_in_place(descriptor):
                break
            # The run that held the lock has just ended, and has deleted the file.
            os.close(descriptor)
        self._descriptor = descriptor
        try:
            with named_errors(self._file):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:  # the disk is full
            self.release()
            raise
        return ""

    def release(self) -> None:
        """Give the lock back, and delete what it made."""
        assert self._descriptor is not None
        # Deleted before it is unlocked, so that nobody locks a file that is then deleted.
        self._file.unlink(missing_ok=True)
        os.close(self._descriptor)
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()

    def _is_in_place(self, descriptor: int) -> bool:
        """Whether the file that is open is still that of the folder."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._file.stat())
        except FileNotFoundError:
            return False


def _missing(folder: Path) -> list[Path]:
    """The folder and its parents that do not exist yet, the innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    return missing
