"""Load and save tokenizers and their chat templates with transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: str | Path) -> Any:
    """Loads the transformers tokenizer of a folder; None if it holds none.

    Raises:
      ValueError: its files cannot be read.
    """
    if not any((Path(folder) / name).is_file() for name in FILES):
        return None
    try:
        return import_transformers().AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True
        )
    except Exception as error:  # transformers and tokenizers pass on whatever their parsers raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {reason}"
        ) from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer's files into a folder.

    Raises:
      OSError: they cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises a plain Exception when the disk is full
        raise OSError(f"the tokenizer: {error}") from error


def import_transformers() -> Any:
    """Imports transformers.

    It advises installing PyTorch, which this library does not use; the variable silences that.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
