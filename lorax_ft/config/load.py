"""Config files: Python with `get_config()`, YAML or JSON, of ours and of other trainers."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from lorax_ft.checks import check, one_line
from lorax_ft.config.document import Document, read_document
from lorax_ft.config.foreign.peft_types import TABLES
from lorax_ft.config.foreign.source import LLAMA_FACTORY, Source, peft_trainer, read_foreign
from lorax_ft.config.run import Config

PACKAGE = Path(__file__).parents[1]
SUFFIXES = (".yaml", ".yml", ".json")
"""Of files that hold values; others are Python."""
_SECTIONS = [field.name for field in dataclasses.fields(Config)]
# Keys that only files of other kinds have.
_NOT_READ = {
    "task": ("AutoTrain", "give its values to lorax-ft autotrain llm"),
    **dict.fromkeys(
        ("base_model", "micro_batch_size", "sequence_len"),
        (
            "axolotl",
            "lorax-ft train --NAME VALUE says which option is ours for a name of axolotl's",
        ),
    ),
    "model_class": ("LLaMA-Factory's v1", "its other form, with model_name_or_path, is"),
    "compute_environment": ("accelerate", "it starts processes, and mesh.* splits a run here"),
}


class Loaded(NamedTuple):
    """A config, and where it comes from if it was translated."""

    config: Config
    source: Source | None = None


def load_config(path: str | Path) -> Config:
    """The config of a file.

    Args:
      path: a .py file with `get_config()`; a .yaml or .json file with our sections, such as the
        config.json of a run; LLaMA-Factory's YAML; PEFT's adapter_config.json; or the name of a
        config that comes with the library, such as "pissa". A batch size per device is taken for
        one device.

    Warns:
      UserWarning: keys of another trainer that are not honored.

    Raises:
      ValueError: the file is missing, raises an exception, or holds no valid config.
    """
    config, source = read_config(path)
    if source is not None and source.unused:
        keys = ", ".join(source.unused)
        warnings.warn(f"{source.path}: not honored: {keys}", stacklevel=2)
    return config


def read_config(path: str | Path, overridden: Collection[str] = ()) -> Loaded:
    """As `load_config`, with what is to be said of a file of another trainer.

    Args:
      path: the file.
      overridden: options that are given beside the file, and win; its keys for them are not read.
    """
    path = _locate(Path(path))
    if path.suffix in SUFFIXES:
        try:
            return _from_values(read_document(str(path)), overridden)
        except ValueError as error:  # names values of the file
            raise ValueError(one_line(str(error))) from error
        except RecursionError as error:
            raise ValueError(f"{path}: a value is nested too deeply") from error
    # importlib returns no loader for other suffixes.
    check(
        path.suffix == ".py",
        f"{path} is neither a .py file with get_config() nor a config.json nor a .yaml file",
    )
    return Loaded(_from_python(path))


def packaged_configs() -> dict[str, Path]:
    """The config files that come with the library, by name."""
    # In a wheel they are in the package, in a checkout beside it.
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        files = sorted(folder.glob("*.py"))
        if files:
            return {file.stem: file for file in files}
    return {}


def _locate(path: Path) -> Path:
    """The file itself, or the packaged one of this name.

    configs/pissa.py is found where there is no checkout, too.
    """
    if path.is_file():
        return path
    packaged = packaged_configs()
    is_name = path.suffix in ("", ".py") and path.parent in (Path(), Path("configs"))
    if is_name and path.stem in packaged:
        return packaged[path.stem]
    siblings = sorted(file.name for file in path.parent.glob("*.py"))
    known, place = list(packaged), "configs of the library"
    if path.parent != Path() and siblings:
        known, place = siblings, f"files in {path.parent}"
    message = f"there is no config file {path}"
    by_stem = {Path(name).stem: name for name in known}
    near = difflib.get_close_matches(path.stem, by_stem, n=1)
    if near:
        message += f"; did you mean {path.with_name(by_stem[near[0]])}?"
    elif known:
        message += f"; {place}: {', '.join(known)}"
    raise ValueError(message)


def _from_python(path: Path) -> Config:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    # The file is user code: it may raise anything.
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    check(
        isinstance(config, Config),
        f"{path}: get_config() returned {type(config).__name__}, not a Config",
    )
    return config


def _from_values(document: Document, overridden: Collection[str]) -> Loaded:
    """The config of a file of ours or of another trainer: its keys decide."""
    keys = list(document.values)
    if all(key in _SECTIONS for key in keys):
        return Loaded(_from_sections(document, overridden))
    if "peft_type" in keys:
        return Loaded(*read_foreign(document, peft_trainer(document), overridden))
    theirs = [key for key in keys if LLAMA_FACTORY.knows(key)]
    of_peft = [key for key in keys if key in TABLES["LORA"]]
    is_peft = len(of_peft) > max(len(theirs), len(keys) // 2)
    if is_peft or Path(document.path).name == "adapter_config.json":
        raise ValueError(f"{document.path} has no peft_type; add it, such as LORA")
    for key, (trainer, advice) in _NOT_READ.items():
        if key in keys:
            raise ValueError(f"{document.where(key)}: a YAML of {trainer} is not read; {advice}")
    # optim is a section of ours, and a text in LLaMA-Factory's files.
    values = document.values
    has_sections = any(key in _SECTIONS and isinstance(values[key], dict) for key in keys)
    if len(theirs) * 2 >= len(keys) and not has_sections:
        return Loaded(*read_foreign(document, LLAMA_FACTORY, overridden))
    unknown = [key for key in keys if key not in _SECTIONS and (has_sections or key not in theirs)]
    if not unknown:  # names of sections with something else than a section behind them
        return Loaded(_from_sections(document, overridden))
    known = _SECTIONS if has_sections else [*_SECTIONS, *LLAMA_FACTORY.table]
    near = difflib.get_close_matches(unknown[0], known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(
        f"{document.where(unknown[0])}: unknown key {unknown[0]!r:.80}{hint}; a config has our "
        f"sections ({', '.join(_SECTIONS)}), LLaMA-Factory's keys (model_name_or_path, …) or those "
        "of a PEFT adapter_config.json (peft_type, …)"
    )


def _from_sections(document: Document, overridden: Collection[str]) -> Config:
    """The config of our own sections."""
    sections = {
        name: {key: v for key, v in values.items() if f"{name}.{key}" not in overridden}
        if isinstance(values, dict)
        else values
        for name, values in document.values.items()
    }
    try:
        return Config.from_sections(sections, overridden)
    except ValueError as error:
        option = re.match(r"[a-z]+\.\w+", str(error))
        place = document.where(option[0]) if option else document.path
        # YAML and JSON have lists.
        message = str(error).replace("it must be a tuple", "it must be a list")
        raise ValueError(f"{place}: {message}") from error
