"""Write folders atomically: next to their place, then renamed into it.

So an error, a full disk or an interruption leaves the old folder as it was.
"""

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
    """Yields an empty folder that replaces `folder` when the block ends without an error.

    Args:
      folder: the place; a link stays, and its target is replaced.
      replaces: patterns of old files to delete, besides those whose names the new folder has.
      others: whether other old files are an error or are kept.

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
        # safetensors creates files that only their owner can read.
        for file in fresh.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())
        kept = _other_files(target, fresh, replaces)
        if kept and others == "refuse":
            raise ValueError(
                f"{folder} holds {', '.join(kept[:3])}, which would be lost; give another folder"
            )
        # Copied rather than moved, since the scratch folder is deleted if anything fails.
        for name in kept:
            if (target / name).is_dir():
                shutil.copytree(target / name, fresh / name)
            else:
                shutil.copy2(target / name, fresh / name)
        _swap(target, fresh, aside=scratch / "old")


@contextlib.contextmanager
def scratch_beside(target: Path, *, given: str | Path) -> Iterator[Path]:
    """Yields a temporary folder next to the target, on the same disk, so that renaming works.

    Raises:
      OSError: the block cannot write. The message has the `given` path, not the temporary one.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            yield Path(scratch)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{given} cannot be written: {reason}") from error


def _other_files(target: Path, fresh: Path, replaces: Sequence[str]) -> list[str]:
    """Returns the names in `target` that are not in `fresh` and match no pattern."""
    if not target.is_dir():
        return []
    new_names = os.listdir(fresh)
    others = []
    for name in sorted(os.listdir(target)):
        replaced = any(fnmatch.fnmatch(name, pattern) for pattern in replaces)
        if not replaced and name not in new_names:
            others.append(name)
    return others


def _swap(target: Path, fresh: Path, *, aside: Path) -> None:
    """Moves `target` to `aside` and `fresh` to `target`; puts `target` back if that fails."""
    try:
        if target.exists():
            target.rename(aside)
        fresh.rename(target)
    except BaseException:  # KeyboardInterrupt too
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


def _umask() -> int:
    """Returns the umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
