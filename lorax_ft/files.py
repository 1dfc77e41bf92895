"""Opens files that came with a folder from somebody else: a model, an adapter, a saved dataset.

Such a file may be anything: a pipe that never ends, a link to another place on this machine, or
JSON without an end. What is refused here is refused before it is read.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

LONGEST_JSON = 64_000_000
"""Bytes of a JSON file that is read as a whole; the largest index of a known model has 9 MB."""
LONGEST_NAME = 1000
"""Characters of a file's name in a folder; those of known models have fewer than 100."""
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def within(folder: str | Path, name: str) -> Path:
    """The file of this name in a folder. It need not exist.

    A link may lead to another file of the folder, or of its repository in the cache of the hub,
    where `snapshots/<commit>/config.json` is a link to `../../blobs/<hash>`.

    Raises:
      ValueError: the name, or a link of that name, leads out of the folder.
    """
    if len(name) > LONGEST_NAME:
        raise ValueError(f"{folder} names a file of {len(name):,} characters: {name[:80]!r}…")
    place = PurePath(name)
    if place.is_absolute() or ".." in place.parts:
        raise ValueError(f"{folder} names the file {name[:200]!r}, which is outside of it")
    file = Path(folder, name)
    try:
        target = file.resolve()
        home = _home(Path(folder).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a zero byte
        raise ValueError(
            f"{folder}: {name[:200]!r} cannot be opened: {str(error)[:200]}"
        ) from error
    if not target.is_relative_to(home):
        raise ValueError(
            f"{file} is a link to {target}, which is outside of its folder; put a copy there"
        )
    return file


def existing_folder(folder: str | Path, *, holding: str) -> Path:
    """The path of a folder on this machine.

    Args:
      folder: as a user gave it; ~ is the home folder.
      holding: the file that it is wanted for, for errors.

    Raises:
      ValueError: there is no such folder, with the nearest name; or it is a file, a URL or empty.
    """
    if "://" in str(folder):
        raise ValueError(f"{folder} is not on this machine; copy it to a local folder first")
    path = Path(folder).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise ValueError(f"{folder} is empty; give a folder that holds {holding}")
        return path
    if path.exists():
        raise ValueError(
            f"{folder} is a file; give the folder that holds {holding}, such as {path.parent}"
        )
    parent = path.parent
    if not parent.is_dir():
        raise ValueError(f"there is no folder {folder}, nor {parent}")
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {parent / near[0]}?" if near else ""
    raise ValueError(f"there is no folder {folder}{hint}")


def names_in(folder: Path) -> str:
    """What a folder holds, for an error: at most three names.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in "abcd":
    ...         Path(folder, name).touch()
    ...     names_in(Path(folder))
    'a, b, c and 1 more'
    """
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_regular(file: str | Path) -> None:
    """Raise unless a path is that of a file, after following links.

    Raises:
      FileNotFoundError: there is nothing.
      ValueError: it is a folder, a pipe, a socket or a device.
    """
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{file} is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")


def read_text(file: str | Path, *, longest: int = LONGEST_JSON) -> str:
    """The text of a small UTF-8 file, with or without a byte order mark.

    Raises:
      FileNotFoundError: there is nothing.
      ValueError: it is no file, is not UTF-8, or has more than `longest` bytes.
    """
    check_regular(file)
    with open(file, "rb") as opened:
        data = opened.read(longest + 1)
    if len(data) > longest:
        raise ValueError(f"{file} has more than {longest:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error


def read_json(file: Path, *, unique: bool = False) -> dict[str, Any]:
    """The object in a small JSON file; `unique` is as in `parse_json`.

    Raises:
      ValueError: the file is missing or malformed, or holds something else.
    """
    try:
        text = read_text(file)
    except FileNotFoundError as error:
        raise ValueError(f"{file.parent} holds no {file.name}") from error
    content = parse_json(text, str(file), unique=unique)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def parse_json(text: str, where: str, *, unique: bool = False) -> Any:
    """The value of JSON text; `where` is for errors.

    Args:
      text: the JSON.
      where: its place, for errors.
      unique: whether a repeated key is an error; else the last of them counts.

    Raises:
      ValueError: it is malformed, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is not valid JSON: nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key!r:.80} is given twice; give it once")
        content[key] = value
    return content


@contextlib.contextmanager
def named_errors(file: str | Path) -> Iterator[None]:
    """Raise the system's errors within the block with the name of the file that it writes.

    What fails to open a file has its name; what fails to write to it, as on a full disk, has none.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or not error.strerror:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def write_file(file: Path, text: str) -> None:
    """Write a UTF-8 file. Errors have its name (`named_errors`)."""
    with named_errors(file):
        file.write_text(text, encoding="utf-8")


def _home(folder: Path) -> Path:
    """The folder that links in `folder` may lead to: itself, or its repository in the hub's cache.

    >>> _home(Path("/c/hub/models--a--b/snapshots/12ab")).name
    'models--a--b'
    >>> _home(Path("/models/llama")).name
    'llama'
    """
    for parent in folder.parents:
        is_repository = parent.name.startswith(("models--", "datasets--"))
        if is_repository and folder.is_relative_to(parent / "snapshots"):
            return parent
    return folder
