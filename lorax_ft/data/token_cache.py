"""Keeps tokenized parts of the data on disk, so that the next run on the same data starts at once.

A part is found by what it was made from: the examples themselves, the tokenizer with its chat
template, the options, and the code. So nothing has to be invalidated.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.data.chat import Encoded, Encoder
from lorax_ft.data.conversation import Example

# Parts that no run has used for this long are deleted.
_DAYS = 30
_LIBRARIES = ("jinja2", "numpy", "tokenizers", "transformers")


class TokenCache:
    """Encoded parts in a folder, each in a file of its own."""

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self._folder = folder
        self._encoder_hash = _hash_encoder(encoder)
        self._writes = True

    def key(self, examples: Sequence[tuple[Example, str]]) -> str:
        """The name of the part that these examples become."""
        digest = hashlib.sha256(self._encoder_hash)
        for example, _ in examples:
            digest.update(repr(example).encode(errors="surrogatepass"))
        return digest.hexdigest()

    def read(self, key: str) -> Encoded | None:
        """The part of this name; None if it is not there, or its file is damaged."""
        file = self._file(key)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                counts = json.loads(arrays["counts"].tobytes())
                encoded = Encoded(
                    tokens=arrays["tokens"],
                    mask=arrays["mask"],
                    lengths=arrays["lengths"],
                    endless=counts["endless"],
                    unwritten=counts["unwritten"],
                )
            os.utime(file)  # its last use
        # The checksums of the zip format find damage.
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return None
        return encoded

    def write(self, key: str, encoded: Encoded) -> None:
        """Keeps a part, unless the folder cannot be written to."""
        if not self._writes:
            return
        counts = json.dumps({"endless": encoded.endless, "unwritten": dict(encoded.unwritten)})
        arrays = {
            "tokens": encoded.tokens,
            "mask": encoded.mask,
            "lengths": encoded.lengths,
            "counts": np.frombuffer(counts.encode(), np.uint8),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                try:
                    np.savez(file, allow_pickle=False, **arrays)
                    file.close()
                    os.replace(file.name, self._file(key))
                except (OSError, ValueError):
                    os.unlink(file.name)
                    raise
        # On a full disk zipfile may raise a ValueError, as its file was not ended.
        except (OSError, ValueError) as error:
            self._writes = False
            logging.getLogger(__name__).warning(
                "tokens are not kept in %s: %s",
                self._folder,
                getattr(error, "strerror", None) or error,
            )

    def delete_old(self) -> None:
        """Deletes parts that no run has used for 30 days."""
        oldest = time.time() - _DAYS * 24 * 3600
        with contextlib.suppress(OSError):
            for file in self._folder.iterdir():
                # Another run may delete it at the same time.
                with contextlib.suppress(OSError):
                    if file.stat().st_mtime < oldest:
                        file.unlink()

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.npz"


def cache_folder(option: str | None) -> Path | None:
    """The folder of the option data.cache; None if tokens are not kept."""
    if option is None:
        return None
    if option != "auto":
        return Path(option).expanduser()
    chosen = os.environ.get("LORAX_FT_CACHE")
    if chosen:
        return Path(chosen) / "tokens"
    return Path("~/.cache/lorax_ft/tokens").expanduser()


def _hash_encoder(encoder: Encoder) -> bytes:
    """A hash of all that an encoder's results depend on, beside the examples."""
    tokenizer = encoder.tokenizer
    template = str(tokenizer.chat_template)
    parts: list[Any] = [
        _code(),
        encoder.loss_on,
        encoder.reasoning_loss,
        encoder.append_end,
        encoder.control_tokens,
        type(tokenizer).__name__,
        tokenizer.special_tokens_map,
        template,
    ]
    if "strftime_now" in template:
        parts.append(datetime.date.today())
    digest = hashlib.sha256(repr(parts).encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.digest()


@functools.cache
def _code() -> str:
    """A hash of this package, and the versions of the libraries that it tokenizes with."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    versions = [importlib.metadata.version(library) for library in _LIBRARIES]
    return f"{digest.hexdigest()} {versions}"
