"""Folders that are written beside their place and renamed into it, so that none is ever half written."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: str | Path, *, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends without an error.

    Args:
      folder: the place.
      replaces: patterns of files that may be there and go, beside those whose names the new folder has.

    Raises:
      ValueError: `folder` is a file, or holds files that the new folder would not replace.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder to write to")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        yield fresh
        for file in fresh.rglob("*"):  # safetensors' are readable by their owner alone
            if file.is_file():
                file.chmod(0o666 & ~_umask())
        old = {name for name in _names(target) if not any(fnmatch.fnmatch(name, pattern) for pattern in replaces)}
        others = sorted(old - _names(fresh))
        if others:
            raise ValueError(f"{target} holds {', '.join(others[:3])}, which would be lost; give another folder")
        if target.exists():
            target.rename(Path(scratch) / "old")
        fresh.rename(target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
