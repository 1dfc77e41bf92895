"""Output paths on buckets: gs:// and s3://."""

from __future__ import annotations

from pathlib import Path

import fsspec
from etils import epath

EXTRAS = {"gs": "gcs", "s3": "s3"}
"""The schemes of buckets, and the extra of this package that installs the client of each."""
MARKERS = ("config.json", "adapter_config.json")
"""Files by which a reader recognizes a model or an adapter."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is the URL of a bucket."""
    return "://" in str(path)


def output_path(path: str | Path) -> Path:
    """The path to write to: an `epath.Path` on a bucket, a `pathlib.Path` on a disk.

    An `epath.Path` has the methods of pathlib.

    Raises:
      ValueError: the scheme is not supported, or its client is not installed.
    """
    # Not epath for all: its local paths do not resolve links, for example.
    if not is_remote(path):
        return Path(path)
    scheme, _, _ = str(path).partition("://")
    if scheme not in EXTRAS:
        raise ValueError(f"{path}: {scheme}:// is not supported; use a local path, gs:// or s3://")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = EXTRAS[scheme]
        raise ValueError(f'{path}: {error}; run pip install "lorax_ft[{extra}]"') from error
    return epath.Path(str(path))


def upload(local: Path, remote: Path) -> None:
    """Copy the files of a local folder to a folder on a bucket, the markers last.

    Raises:
      OSError: the bucket cannot be written.
    """
    files = [path for path in sorted(local.rglob("*")) if path.is_file()]
    files.sort(key=lambda file: file.name in MARKERS)
    try:
        # No mkdir: a bucket has no folders, and gcsfs would create a missing bucket.
        for file in files:
            epath.Path(str(file)).copy(remote / str(file.relative_to(local)), overwrite=True)
    except Exception as error:  # the clients of buckets have exceptions of their own
        raise OSError(f"{remote} cannot be written: {error}") from error


def check_bucket(folder: Path, *, probe: str) -> None:
    """Raise if a folder on a bucket cannot be written; uploads an object `probe` and deletes it.

    Raises:
      ValueError: the bucket does not exist, or there are no credentials for it.
    """
    try:
        (folder / probe).write_text("")
        (folder / probe).unlink()
    except Exception as error:  # the clients of buckets have exceptions of their own
        raise ValueError(f"{folder} cannot be written: {error}") from error


def delete(path: Path) -> None:
    """Delete a file or a folder on a bucket, if there is one."""
    if path.is_dir():
        path.rmtree()  # type: ignore[attr-defined]  # pathlib.Path has no such method
    elif path.exists():
        path.unlink()
