"""Errors of a checkpoint that cannot be written, in one line that says what to do.

orbax writes in threads: it logs a traceback for each that fails, and raises one of their errors,
which may name no file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def write_errors(folder: Path, step: int) -> Iterator[None]:
    """Raise what goes wrong within the block as an OSError with the folder and the step.

    Args:
      folder: of the checkpoints.
      step: the checkpoint that is being written.

    Raises:
      OSError: the block cannot write. One that names a file elsewhere is passed on.
    """
    # Adding it again changes nothing.
    logging.getLogger("absl").addFilter(_is_not_raised)
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        named = getattr(error, "filename", None)
        if named and not Path(named).absolute().is_relative_to(Path(folder).absolute()):
            raise
        raise OSError(
            f"{folder}: the checkpoint of step {step} cannot be written: {_reason(error)}; once "
            "that is mended, the same command goes on from the last checkpoint"
        ) from error


def _reason(error: Exception) -> str:
    """The system's words for an error, or the error's own."""
    # tensorstore names the call, the file and a number: "... [os_error_code='28']".
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_not_raised(record: logging.LogRecord) -> bool:
    """Whether a record is other than a traceback of orbax, whose error is raised as well."""
    return not (record.exc_info and "orbax" in record.pathname)
