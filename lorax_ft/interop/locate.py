"""Where a model is: a Hugging Face folder, a GGUF file, or the hub; and its config.json alone."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax_ft.files import read_json, within
from lorax_ft.interop.gguf import read_gguf
from lorax_ft.interop.text_part import text_config
from lorax_ft.offline import hub_or_cache

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
# Second copies of the weights, in the formats of Mistral (consolidated) and Meta (original).
HUB_DUPLICATES = ("consolidated*", "original/*")


def locate(path: str | Path, revision: str | None, *, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder or .gguf file at `path`; of a hub id these files are downloaded first."""
    local = Path(path).expanduser()
    if local.is_dir():
        _check_folder(local, path)
        return local
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(
                f"{path} is a file but not a .gguf file; give a folder, a .gguf file or a hub id"
            )
        return local
    # A hub id has the form owner/name. If a folder `owner` exists, this is a misspelled local path,
    # for which an error of the hub would only confuse.
    looks_local = (
        isinstance(path, Path)
        or local.suffix == ".gguf"
        or str(path)[:1] in "./~"
        or str(path).count("/") != 1
    )
    if looks_local or local.parent.is_dir():
        raise ValueError(f"no model at {path}{_nearest(local)}")
    return _download(str(path), revision, files)


def _check_folder(folder: Path, path: str | Path) -> None:
    """Raises a `ValueError` if a folder has .gguf files in place of a checkpoint."""
    if (folder / "config.json").exists():
        return
    files = sorted(folder.glob("*.gguf"))
    if files:
        raise ValueError(f"{path} holds no config.json, but {files[0].name}; give {files[0]}")


def _nearest(missing: Path) -> str:
    """What the parent folder holds in place of the missing path, for an error."""
    parent = missing.parent
    if not parent.is_dir():
        return f"; there is no folder {parent}"
    names = []
    for path in sorted(parent.iterdir()):
        if path.is_dir() or path.suffix == ".gguf":
            names.append(path.name)
    if not names:
        return f"; {parent} holds no model"
    near = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.3)
    return f"; in {parent} there is {', '.join(near or names[:3])}"


def _download(hub_id: str, revision: str | None, files: Sequence[str]) -> Path:
    import huggingface_hub

    unreachable = ""
    try:
        with hub_or_cache(hub_id, repo_type="model", revision=revision) as unreachable:
            folder = huggingface_hub.snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=list(HUB_DUPLICATES),
            )
    except Exception as error:  # no common type for connection, permission and unknown-id errors
        tried = f"the hub id {hub_id}"
        if revision:
            tried += f" at revision {revision}"
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
            why = unreachable or "HF_HUB_OFFLINE is set; give a local folder"
            reason = f"the model is not cached, and {why}"
        raise ValueError(
            f"no folder at {hub_id}, and {tried} failed: {type(error).__name__}: {reason}"
        ) from error
    return Path(folder)


def read_model_config(path: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Reads the config.json of a model, whose weights are neither read nor downloaded.

    Args:
      path: as in `load_model`.
      revision: as in `load_model`.

    Raises:
      ValueError: there is no model at `path`, or its config.json is damaged.
    """
    location = locate(path, revision, files=("config.json",))
    if location.suffix == ".gguf":
        hf_config, _, _ = read_gguf(location)
        return hf_config
    hf_config = text_config(read_json(within(location, "config.json")))
    # The weights are planned as they are computed with, not as they are stored.
    hf_config.pop("quantization_config", None)
    return hf_config
