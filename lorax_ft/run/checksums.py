"""Checksums of the files of a checkpoint, by which a damaged or incomplete one is known.

orbax and tensorstore do not verify arrays when they read them: a flipped byte would become another
weight in silence.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lorax_ft.interop.bucket import files_below

CHECKSUMS = "checksums.json"
# orbax writes these when it commits the checkpoint, after the checksums. Nothing is read from them.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file in a folder into its checksums.json."""
    checksums = {}
    for name, file in _files(folder).items():
        checksums[name] = _checksum(file)
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1, sort_keys=True) + "\n")


def find_damage(folder: Path) -> str:
    """What is wrong with a folder by its checksums.json; empty if nothing is."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {CHECKSUMS}"
    except (ValueError, RecursionError):
        return f"its {CHECKSUMS} cannot be read"
    files = _files(folder)
    if not isinstance(expected, dict) or not expected:
        return f"its {CHECKSUMS} lists no files"
    for name, checksum in expected.items():
        if name not in files:
            return f"{name} is missing"
        if _checksum(files[name]) != checksum:
            return f"{name} has another checksum"
    return ""


def _files(folder: Path) -> dict[str, Path]:
    """The files that have checksums, by their names below the folder."""
    files = {}
    for file in sorted(files_below(folder)):
        name = str(file.relative_to(folder))
        if name not in (*LATER, CHECKSUMS):
            files[name] = file
    return files


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
