"""Output paths on buckets, gs:// and s3://, and on the hub, hf://."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils import epath

HUB = "hf://"
EXTRAS = {"gs": "gcs", "s3": "s3"}
"""The schemes of buckets, and the extra of this package that installs the client of each."""
MARKERS = ("config.json", "adapter_config.json")
"""Files by which a reader recognizes a model or an adapter."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is the URL of a bucket or of a repository on the hub."""
    return "://" in str(path)


def is_hub(path: str | Path) -> bool:
    """Whether a path is a repository on the hub."""
    return str(path).startswith(HUB)


def repo_id(path: str | Path) -> str:
    """The id, owner/name, in hf://owner/name.

    Raises:
      ValueError: it is not of that form.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = str(path).removeprefix(HUB).rstrip("/")
    if name.count("/") != 1:
        raise ValueError(f"{path} is not a repository on the hub; give {HUB}owner/name")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{path}: {error}") from error
    return name


def output_path(path: str | Path) -> Path:
    """The path to write to: an `epath.Path` on a bucket or the hub, else a `pathlib.Path`.

    An `epath.Path` has the methods of pathlib, which on the hub are not to be used.

    Raises:
      ValueError: the scheme is not supported, its client is not installed, or the path is no
        repository on the hub.
    """
    # Not epath for all: its local paths do not resolve links, for example.
    if not is_remote(path):
        _check_slashes(str(path))
        return Path(path).expanduser()
    if is_hub(path):
        repo_id(path)
        return epath.Path(str(path))
    scheme, _, _ = str(path).partition("://")
    if scheme not in EXTRAS:
        raise ValueError(
            f"{path}: {scheme}:// is not supported; use a local path, gs://, s3:// or hf://"
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = EXTRAS[scheme]
        raise ValueError(f'{path}: {error}; run pip install "lorax_ft[{extra}]"') from error
    return epath.Path(str(path))


def _check_slashes(path: str) -> None:
    """Raise for "gs:/bucket", which would be a local folder."""
    scheme, colon, rest = path.partition(":/")
    if colon and scheme in (*EXTRAS, HUB.removesuffix("://")):
        raise ValueError(f"{path} has one slash after {scheme}:; did you mean {scheme}://{rest}?")


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


@contextlib.contextmanager
def local_copy(folder: Path) -> Iterator[Path]:
    """Yields a local folder with the files of `folder`: itself, or a copy if it is on a bucket."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        for file in files_below(folder):
            target = Path(scratch) / str(file.relative_to(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        yield Path(scratch)


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in the folders below it. Not by rglob, which epath refuses on gs://."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from files_below(entry)
        else:
            yield entry


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
