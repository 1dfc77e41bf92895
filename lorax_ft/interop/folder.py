"""Folders that are written beside their place and renamed into it, so that none is ever half written."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import safetensors


@contextlib.contextmanager
def new_folder(
    folder: str | Path,
    *,
    replaces: Sequence[str] = (),
    others: Literal["refuse", "keep"] = "refuse",
) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends without an error.

    Args:
      folder: the place; a link stays, and what it leads to is replaced.
      replaces: patterns of files that may be there and go, beside those whose names the new folder has.
      others: what becomes of other files that are there.

    Raises:
      ValueError: `folder` is a file, or holds files that the new folder would not replace.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write to")
    with scratch_beside(target, given=folder) as scratch:
        fresh = scratch / "new"
        fresh.mkdir()
        yield fresh
        for file in fresh.rglob("*"):  # safetensors' are readable by their owner alone
            if file.is_file():
                file.chmod(0o666 & ~_umask())
        old = {
            name
            for name in _names(target)
            if not any(fnmatch.fnmatch(name, pattern) for pattern in replaces)
        }
        left = sorted(old - _names(fresh))
        if left and others == "refuse":
            raise ValueError(
                f"{folder} holds {', '.join(left[:3])}, which would be lost; give another folder"
            )
        for name in left:  # copied, so that they are never only in what is deleted
            copy = shutil.copytree if (target / name).is_dir() else shutil.copy2
            copy(target / name, fresh / name)
        aside = scratch / "old"
        try:
            if target.exists():
                target.rename(aside)
            fresh.rename(target)
        except BaseException:  # an interruption too
            if aside.exists() and not target.exists():
                aside.rename(target)
            raise


@contextlib.contextmanager
def scratch_beside(target: Path, *, given: str | Path) -> Iterator[Path]:
    """A folder on the target's disk for the time of the block.

    Raises:
      OSError: the block cannot write; it names what was `given`, and not what lies beside it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            yield Path(scratch)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{given} cannot be written: {reason}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
