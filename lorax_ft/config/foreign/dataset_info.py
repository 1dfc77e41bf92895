"""LLaMA-Factory's dataset_info.json: where a dataset is, and what its fields are called."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from lorax_ft.config.foreign.rules import Keys, closest, is_number, shown
from lorax_ft.files import read_json

FILE = "dataset_info.json"
ONLINE = "ONLINE"
"""A dataset_dir whose datasets are Hub ids."""
# Our names of the fields of a row and of a turn, by theirs.
_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
        "system": "system",
        "tools": "tools",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
}
# The fields of theirs that a row has where `columns` is absent.
_DEFAULT_COLUMNS = {
    "alpaca": ("instruction", "input", "output"),
    "sharegpt": ("conversations",),
}
_TURN = {"role_tag": "role", "content_tag": "content"}
# What a turn's fields may be called without a word.
_FOUND = ("role", "from", "content", "value")
# The names of roles that each of their tags may have, of those that lorax_ft.data.turns knows.
_ROLES: Mapping[str, tuple[str, ...]] = {
    "user_tag": ("human", "user", "prompter"),
    "assistant_tag": ("gpt", "assistant", "chatgpt", "model", "bot", "ai"),
    "observation_tag": (
        *("observation", "tool", "function", "tool_response", "function_response", "ipython"),
    ),
    "function_tag": ("function_call", "tool_call"),
    "system_tag": ("system", "developer"),
}
_ELSEWHERE = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_OTHER_DATA = ("ranking", "images", "videos", "audios", "chosen", "rejected", "kto_tag")
_KNOWN = (
    *("file_name", "hf_hub_url", "formatting", "subset", "split", "num_samples", "columns"),
    *("tags", "folder", "ranking", *_ELSEWHERE),
)


class Described(NamedTuple):
    """A dataset as data.train and the other options of the data name it."""

    name: str
    source: str
    key: str
    """The key that names it."""
    split: str = "train"
    shape: Literal["alpaca", "sharegpt", "messages"] = "alpaca"
    fields: Mapping[str, str] = MappingProxyType({})
    """The data's own names of the fields, by ours, also where the two are the same."""


def describe(
    names: Sequence[str], folder: str, keys: Keys, *, key: str, most: int | None
) -> list[Described]:
    """The datasets of these names.

    Args:
      names: the datasets.
      folder: that of dataset_info.json.
      keys: of the config that names them, for errors.
      key: the one that names them.
      most: the largest number of rows of each.

    Raises:
      ValueError: there is no such dataset, or it cannot be read here.
    """
    if not names:
        return []
    if folder == ONLINE:
        return [Described(name, _limited(name, most), key) for name in names]
    if folder.startswith("REMOTE:"):
        raise keys.error(
            "dataset_dir", f"dataset_dir {shown(folder)}: download it, and name its folder"
        )
    file = Path(os.path.expanduser(folder)) / FILE
    if not os.path.isfile(file):  # false for names that no disk has
        raise keys.error(
            key,
            f"{key}: there is no {shown(file)}, which says what {shown(', '.join(names))} is; "
            "start where it is, set dataset_dir, or give "
            f"--data.{'train' if key == 'dataset' else 'validation'}",
        )
    try:
        known = read_json(file, unique=True)
        return [_described(name, known, file, key=key, most=most) for name in names]
    except ValueError as error:
        raise keys.error(key, f"{key}: {error}") from error


def common_fields(datasets: Sequence[Described], keys: Keys) -> tuple[str, ...]:
    """data.fields for all of these datasets.

    Raises:
      ValueError: two of them call the same field differently.
    """
    fields: dict[str, tuple[str, str]] = {}
    for dataset in datasets:
        for ours, theirs in dataset.fields.items():
            first, name = fields.setdefault(ours, (dataset.name, theirs))
            if name != theirs and "data.fields" not in keys.overridden:
                raise keys.error(
                    dataset.key,
                    f"{dataset.key}: {first} has {ours} in the field {name!r}, and {dataset.name} "
                    f"in {theirs!r}; data.fields has one name for all datasets, so rename the "
                    "field in the rows of one of them, or train on one after the other",
                )
    renamed = {ours: theirs for ours, (_, theirs) in fields.items() if ours != theirs}
    return tuple(f"{ours}={theirs}" for ours, theirs in renamed.items())


def _described(
    name: str, known: Mapping[str, Any], file: Path, *, key: str, most: int | None
) -> Described:
    """The dataset of this name."""
    if name not in known:
        hint = closest(name, known) or f"; it has {', '.join(map(shown, list(known)[:20]))}"
        raise ValueError(f"{file} has no dataset {name!r:.80}{hint}")
    entry = known[name]
    where = f"{file}: {name}"
    _check(entry, where)
    shape = entry.get("formatting", "alpaca")
    # Its own name for ShareGPT with other tags.
    shape = "sharegpt" if shape == "openai" else shape
    if shape not in _COLUMNS:
        raise ValueError(f"{where}: formatting is {shape!r:.80}; it can be {' or '.join(_COLUMNS)}")
    rows = [number for number in (entry.get("num_samples"), most) if number is not None]
    source = _limited(_source(entry, file.parent, where), min(rows, default=None))
    fields = _fields(entry, shape, where)
    if fields.get("conversations") == "messages":
        shape = "messages"
        del fields["conversations"]
    return Described(name, source, key, entry.get("split") or "train", shape, fields)


def _check(entry: Any, where: str) -> None:
    """Raise for an entry whose data is of another kind, or whose values have wrong types."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r:.60}; it must be keys with values")
    for name, value in entry.items():
        if name not in _KNOWN:
            hint = closest(name, _KNOWN) or f"; known: {', '.join(_KNOWN)}"
            raise ValueError(f"{where}: there is no {name!r:.80}{hint}")
        _check_value(name, value, where)
        # Those of columns and tags are names.
        for inner, own in value.items() if isinstance(value, dict) else ():
            if not isinstance(own, str | None):
                raise ValueError(f"{where}: {inner} is {own!r:.60}; it must be a text")
    for name in _OTHER_DATA:
        if entry.get(name) or (entry.get("columns") or {}).get(name):
            raise ValueError(f"{where} has {name}, and only texts with one answer are trained on")


def _check_value(name: str, value: Any, where: str) -> None:
    """Raise for a value of another type than its key has."""
    if value is None:
        return
    kinds: Mapping[str, tuple[type, str]] = {
        "columns": (dict, "keys with names"),
        "tags": (dict, "keys with names"),
        "num_samples": (int, "a whole number above 0"),
        "ranking": (bool, "true or false"),
    }
    kind, words = kinds.get(name, (str, "a text"))
    is_kind = isinstance(value, kind)
    if name == "num_samples":
        is_kind = is_kind and is_number(value) and value > 0
    if not is_kind:
        raise ValueError(f"{where}: {name} is {value!r:.60}; it must be {words}")


def _source(entry: Mapping[str, Any], folder: Path, where: str) -> str:
    """The path or the Hub id of a dataset."""
    hub = entry.get("hf_hub_url")
    if hub:
        if entry.get("folder"):
            raise ValueError(f"{where}: a folder of a Hub dataset cannot be read; download it")
        return f"{hub}:{entry['subset']}" if entry.get("subset") else hub
    for name in _ELSEWHERE:
        if entry.get(name):
            raise ValueError(f"{where}: {name} cannot be read; download it, and give file_name")
    if not entry.get("file_name"):
        raise ValueError(f"{where} has no file_name and no hf_hub_url")
    path = folder / entry["file_name"]
    if not path.is_dir():
        return str(path)
    # All files of the folder, which are of one type; ours reads one file for each split.
    suffixes = sorted({file.suffix for file in path.iterdir() if file.suffix})
    if len(suffixes) != 1:
        raise ValueError(f"{where}: {path} holds files of the types {suffixes}; one is needed")
    return str(path / f"*{suffixes[0]}")


def _limited(source: str, most: int | None) -> str:
    """The first rows of a source."""
    return source if most is None else f"{source}[:{most}]"


def _fields(entry: Mapping[str, Any], shape: str, where: str) -> dict[str, str]:
    """The data's own names of the fields, by ours."""
    columns = entry.get("columns")
    ours = _COLUMNS[shape]
    if columns is None:
        columns = {theirs: own for theirs, own in ours.items() if own in _DEFAULT_COLUMNS[shape]}
    fields = {ours[name]: own for name, own in columns.items() if name in ours and own}
    unknown = sorted(set(columns) - {*_COLUMNS["alpaca"], *_COLUMNS["sharegpt"], *_OTHER_DATA})
    if unknown:
        raise ValueError(
            f"{where}: there is no column {unknown[0]!r:.80}; known: {', '.join(ours)}"
        )
    if shape != "sharegpt":
        return fields
    fields |= {ours: ours for ours in _TURN.values()}
    for name, own in (entry.get("tags") or {}).items():
        if name in _TURN:
            if own and own not in _FOUND:
                fields[_TURN[name]] = own
        elif name not in _ROLES:
            raise ValueError(f"{where}: there is no tag {name!r:.80}; known: {', '.join(_ROLES)}")
        elif own and own not in _ROLES[name]:
            raise ValueError(
                f"{where}: {name} is {own!r:.80}; the role can be named {', '.join(_ROLES[name])}"
            )
    return fields
