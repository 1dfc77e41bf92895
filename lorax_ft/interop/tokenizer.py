"""Load and save tokenizers and their chat templates with transformers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lorax_ft.interop.encoding import PANIC
from lorax_ft.interop.tokenizer_check import check_files

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
ALL_FILES = (
    *FILES,
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.txt",
)
"""Everything that transformers reads a tokenizer from; one of them is a folder."""


def load_tokenizer(folder: str | Path) -> Any:
    """Loads the transformers tokenizer of a folder; None if it holds none.

    Raises:
      ValueError: its files cannot be read.
    """
    if not any((Path(folder) / name).is_file() for name in FILES):
        return None
    check_files(Path(folder), ALL_FILES)
    try:
        # Where a tokenizer_config.json names code in the folder, it is neither run nor asked about.
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        _check_template(tokenizer.chat_template)
        return tokenizer
    # transformers and tokenizers pass on whatever their parsers raise, a panic among it.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {reason}"
        ) from error


def _check_template(template: Any) -> None:
    """Raise unless a chat template is a text, or are texts by name."""
    texts = template.values() if isinstance(template, dict) else [template]
    if not all(isinstance(text, str | None) for text in texts):
        raise ValueError(f"chat_template is {repr(template)[:80]}; it must be a text")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer's files into a folder, so that transformers 4 and 5 load them.

    A tokenizer that is as it was loaded from a folder is copied: its files stay as they are, byte
    for byte, unless only the config.json of the model names its class and `folder` holds none.
    Files that have vanished since are written anew, as transformers writes them.

    Raises:
      OSError: they cannot be written.
    """
    copied = _is_untouched(tokenizer) and _copied(Path(tokenizer.name_or_path), folder)
    # An adapter's folder has no config.json.
    if copied and ((folder / "config.json").is_file() or _names_its_class(folder)):
        return
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises a plain Exception when the disk is full
        raise OSError(f"the tokenizer: {error}") from error
    _make_readable_by_transformers_4(folder / "tokenizer_config.json")


def _names_its_class(folder: Path) -> bool:
    """Whether AutoTokenizer finds the class without the config.json of the model."""
    file = folder / "tokenizer_config.json"
    return file.is_file() and "tokenizer_class" in json.loads(file.read_text(encoding="utf-8"))


def _is_untouched(tokenizer: Any) -> bool:
    """Whether loading the tokenizer's folder again gives the same tokenizer."""
    if not tokenizer.name_or_path:
        return False
    try:
        again = load_tokenizer(tokenizer.name_or_path)
    except (ValueError, OSError):  # the files are no longer what they were, or where
        return False
    return again is not None and _state(tokenizer) == _state(again)


def _state(tokenizer: Any) -> dict[str, Any]:
    """Returns what a tokenizer's files hold."""
    state: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "length": tokenizer.model_max_length,
        "side": tokenizer.padding_side,
    }
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls with padding or truncation leave them here; they change no token.
        state["parts"] = parts | {"padding": None, "truncation": None}
    else:
        state["vocabulary"] = tokenizer.get_vocab()
    return state


def _copied(source: Path, folder: Path) -> bool:
    """Copies a tokenizer's files. Returns whether all of them were still there."""
    try:
        for name in ALL_FILES:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name)
            elif (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    except FileNotFoundError:
        return False
    return True


def _make_readable_by_transformers_4(file: Path) -> None:
    """Rewrites what transformers 5 put into tokenizer_config.json under names that 4 knows, too."""
    config = json.loads(file.read_text(encoding="utf-8"))
    # How the tokenizer was loaded here says nothing about the tokenizer.
    for name in ("is_local", "local_files_only", "backend"):
        config.pop(name, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def import_transformers() -> Any:
    """Imports transformers.

    It advises installing PyTorch, which this library does not use; the variable silences that.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
