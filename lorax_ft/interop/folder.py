"""Write folders atomically: next to their place, then renamed into it.

So an error, a full disk or an interruption leaves the old folder as it was. A bucket has no rename:
there, the files are uploaded once all of them are complete.
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
from etils import epath

from lorax_ft.interop.bucket import MARKERS, is_hub, is_remote, output_path, upload
from lorax_ft.interop.hub import push_folder


@contextlib.contextmanager
def new_folder(
    folder: str | Path,
    *,
    replaces: Sequence[str] = (),
    others: Literal["refuse", "keep"] = "refuse",
) -> Iterator[Path]:
    """Yields an empty local folder that replaces `folder` when the block ends without an error.

    Args:
      folder: the place, on a disk, a bucket or the hub; a link stays, and its target is replaced.
      replaces: patterns of old files to delete, besides those whose names the new folder has.
      others: whether other old files are an error or are kept. The hub keeps them.

    Raises:
      ValueError: `folder` is a file, or holds files that the new folder would not replace.
    """
    if is_hub(folder):
        with tempfile.TemporaryDirectory() as scratch:
            with _write_errors(folder):
                yield Path(scratch)
            push_folder(Path(scratch), folder, replaces=replaces)
        return
    if is_remote(folder):
        with _new_remote_folder(output_path(folder), replaces=replaces, others=others) as fresh:
            yield fresh
        return
    target = Path(folder).expanduser().resolve()
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
        if others == "refuse":
            _check_none_lost(kept, given=folder)
        # Copied rather than moved, since the scratch folder is deleted if anything fails.
        for name in kept:
            if (target / name).is_dir():
                shutil.copytree(target / name, fresh / name)
            else:
                shutil.copy2(target / name, fresh / name)
        _swap(target, fresh, aside=scratch / "old")


@contextlib.contextmanager
def _new_remote_folder(
    target: Path,
    *,
    replaces: Sequence[str],
    others: Literal["refuse", "keep"],
) -> Iterator[Path]:
    """`new_folder` on a bucket."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder to write to")
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        with _write_errors(target):
            yield fresh
        if others == "refuse":
            _check_none_lost(_other_files(target, fresh, replaces), given=target)
        # An interruption may leave a mix of old and new files. Without a marker, no reader takes
        # them for a model.
        for name in _names(target):
            if (target / name).is_dir():
                if _matches(name, replaces):
                    epath.Path(target / name).rmtree()
            elif name in MARKERS or _matches(name, replaces):
                (target / name).unlink()
        upload(fresh, target)


@contextlib.contextmanager
def scratch_beside(target: Path, *, given: str | Path) -> Iterator[Path]:
    """Yields a temporary folder next to the target, on the same disk, so that renaming works.

    Raises:
      OSError: the block cannot write. The message has the `given` path, not the temporary one.
    """
    with _write_errors(given):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            yield Path(scratch)


@contextlib.contextmanager
def _write_errors(given: str | Path) -> Iterator[None]:
    """Raises the errors of the block with the path that the caller gave."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{given} cannot be written: {reason}") from error


def _other_files(target: Path, fresh: Path, replaces: Sequence[str]) -> list[str]:
    """Returns the names in `target` that are not in `fresh` and match no pattern."""
    new_names = _names(fresh)
    others = []
    for name in _names(target):
        if not _matches(name, replaces) and name not in new_names:
            others.append(name)
    return others


def _names(folder: Path) -> list[str]:
    """Returns the names in a folder; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _check_none_lost(names: Sequence[str], *, given: str | Path) -> None:
    """Raises a `ValueError` if the old folder holds files that the new one does not replace."""
    if names:
        raise ValueError(
            f"{given} holds {', '.join(names[:3])}, which would be lost; give another folder"
        )


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
