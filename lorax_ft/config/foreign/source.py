"""The config that a file of another trainer means, and what is to be said of it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from lorax_ft.checks import one_line
from lorax_ft.config.data import EMBEDDED_DATA
from lorax_ft.config.document import Document
from lorax_ft.config.foreign import autotrain, llama_factory, peft, peft_types
from lorax_ft.config.foreign.rules import (
    Keys,
    Options,
    Rule,
    Table,
    Translation,
    split_names,
    translate,
)
from lorax_ft.config.run import Config


class Trainer(NamedTuple):
    """A trainer whose configs are read."""

    name: str
    table: Table
    families: Mapping[str, Rule] = {}
    """The rules of keys that begin alike, by their beginning."""
    beside: Mapping[str, Any] = {}
    """Options that no key sets, and that its runs have otherwise than ours."""
    kind: str = ""
    """Which of its configs the keys belong to, if it has several."""

    def knows(self, key: str) -> bool:
        """Whether it has a key of this name."""
        return key in self.table or key.startswith(tuple(self.families))


LLAMA_FACTORY = Trainer(
    llama_factory.NAME, llama_factory.TABLE, llama_factory.FAMILIES, llama_factory.BESIDE
)
AUTOTRAIN = Trainer(autotrain.NAME, autotrain.TABLE, beside=autotrain.BESIDE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a config comes from that was translated."""

    path: str
    trainer: str
    notes: Mapping[str, str]
    """What became of keys where it is not obvious, by key."""
    unused: Mapping[str, str]
    """Why keys are not honored, by key."""
    batch_per_device: bool
    """Whether train.batch_size is that of one device, to be multiplied by their number."""
    shards_weights: bool
    """Whether the weights are to be split over all devices (mesh.fsdp)."""
    unread: Mapping[str, str]
    """The option beside the file that replaces a key, by key."""
    names_data: bool
    """Whether files of its kind say what the data is."""
    places: Mapping[str, str]
    """The place in the file, with the key, that each option comes from."""
    quoted: Mapping[str, str]
    """The same by the names of files, modules and tokens, as an error quotes them."""

    def place(self, problem: str) -> str | None:
        """The place in the file that an error is about; None if it is not about the file."""
        option = re.match(_OPTION, problem)
        if option is not None and option[0] in _OPTIONS:
            return self.places.get(option[0])
        found = [text for text in self.quoted if _is_quoted(text, problem)]
        if found:
            return self.quoted[max(found, key=len)]
        named = [name for name in re.findall(_OPTION, problem) if name in self.places]
        return self.places[named[0]] if named else None

    def remarks(self) -> list[tuple[str, str]]:
        """What a user should know of the translation: keys, and what became of them."""
        remarks = list(self.notes.items())
        by_reason: dict[str, list[str]] = {}
        for key, reason in self.unused.items():
            by_reason.setdefault(reason, []).append(key)
        remarks += [(", ".join(keys), f"not honored: {why}") for why, keys in by_reason.items()]
        if self.unread:
            options = ", ".join(dict.fromkeys(f"--{option}" for option in self.unread.values()))
            are = "are" if "," in options else "is"
            remarks.append((", ".join(self.unread), f"not read: {options} {are} given"))
        return remarks


def peft_trainer(document: Document) -> Trainer:
    """PEFT with the keys of the type of a file.

    Raises:
      ValueError: the type is none that is read.
    """
    kind = peft_types.peft_type(document)
    return Trainer(peft.NAME, peft_types.TABLES[kind], kind=kind)


@contextlib.contextmanager
def named_keys(source: Source | None) -> Iterator[None]:
    """Raises the block's errors about an option with the key of the file that it comes from."""
    try:
        yield
    except ValueError as error:
        place = source.place(str(error)) if source else None
        if place is None:
            raise
        raise ValueError(f"{place}: {error}") from error


def read_foreign(
    document: Document, trainer: Trainer, overridden: Collection[str] = ()
) -> tuple[Config, Source]:
    """The config that a file of a trainer means.

    Args:
      document: the file.
      trainer: the trainer.
      overridden: options that are given beside the file, and win: keys for them are not read.

    Raises:
      ValueError: a key is unknown or cannot be honored, or a value is invalid; with its line.
    """
    keys = Keys(document, overridden)
    owner = f"{trainer.name}'s {trainer.kind}" if trainer.kind else trainer.name
    translation = translate(keys, trainer.table, families=trainer.families, trainer=owner)
    places = {
        option: _place(_key_of(option, translation, document), document, trainer)
        for option in translation.keys
    }
    options = {**trainer.beside, **translation.options}
    config = _config(options, places, document, keys.overridden)
    return config, Source(
        path=document.path,
        trainer=trainer.name,
        notes=translation.notes,
        unused=translation.unused,
        batch_per_device=keys.batch_per_device and "train.batch_size" not in overridden,
        shards_weights=keys.shards_weights and "mesh.fsdp" not in overridden,
        unread=translation.unread,
        names_data="data.train" in _options_of(trainer),
        places=places,
        quoted={
            text: places[option]
            for option, texts in _QUOTED.items()
            if option in places
            for text in texts(translation.options[option])
        },
    )


def for_devices(
    config: Config, source: Source, devices: int
) -> tuple[Config, list[tuple[str, str]]]:
    """The config on so many devices, where the file says something about each device.

    Returns:
      The config, and remarks as those of the source.
    """
    mesh, train = config.mesh, config.train
    # Devices that have rows of their own.
    sharing = max(devices // (mesh.context * mesh.tensor), 1)
    remarks = []
    if source.batch_per_device:
        rows = train.batch_size // train.microbatches
        size = train.batch_size * sharing
        plural = "" if sharing == 1 else "s"
        text = (
            f"{size} = {rows} per device × {train.microbatches} of accumulation × "
            f"{sharing} device{plural}"
        )
        remarks.append(("train.batch_size", text))
        train = dataclasses.replace(train, batch_size=size)
    if source.shards_weights and sharing > mesh.expert:
        fsdp = sharing // mesh.expert
        remarks.append(("mesh.fsdp", f"{fsdp}: the weights are split over the devices"))
        mesh = dataclasses.replace(mesh, data=1, fsdp=fsdp)
    if not source.names_data:
        remarks.append(("data.train", _data(config, source)))
    return dataclasses.replace(config, mesh=mesh, train=train), remarks


def _data(config: Config, source: Source) -> str:
    """Which data a run takes whose file names none."""
    files = config.data.train
    if files == (EMBEDDED_DATA,):
        return "the questions that come with lorax_ft, as the file names no data; give --data.train"
    return f"{', '.join(files)}; a file of {source.trainer} names no data"


def _options_of(trainer: Trainer) -> set[str]:
    """The options that some key of a trainer sets."""
    return {option for rule in trainer.table.values() for option in rule.options}


def _config(
    options: Options,
    places: Mapping[str, str],
    document: Document,
    overridden: Collection[str],
) -> Config:
    """The config with these options."""
    sections: dict[str, dict[str, Any]] = {}
    for option, value in options.items():
        section, _, field = option.partition(".")
        sections.setdefault(section, {})[field] = value
    try:
        return Config.from_sections(sections, overridden)
    except ValueError as error:
        # The option that the error is about comes first.
        named = [name for name in re.findall(_OPTION, str(error)) if name in places]
        place = places[named[0]] if named else document.path
        # YAML and JSON have lists.
        message = str(error).replace("it must be a tuple", "it must be a list")
        raise ValueError(one_line(f"{place}: {message}")) from error


def _key_of(option: str, translation: Translation, document: Document) -> str:
    """The key that an option comes from: of several, the one with its very value."""
    found, value = translation.keys[option], translation.options[option]
    with_it = [key for key in found if value in _readings(document.values.get(key))]
    return [*with_it, *found][0]


def _readings(value: Any) -> tuple[Any, Any]:
    """A value of a file, and the names in it."""
    return value, split_names(value)


def _place(key: str, document: Document, trainer: Trainer) -> str:
    """A key and where it is."""
    shown = f"--{key.replace('_', '-')}" if trainer is AUTOTRAIN else key
    if key not in document.values:
        return f"{document.path} ({shown} is absent)"
    return f"{document.where(key)} ({shown})"


def _paths(value: str | tuple[str, ...] | None) -> list[str]:
    """The paths or ids in an option, without the weights and limits of sources."""
    texts = (value,) if isinstance(value, str) else value or ()
    return [re.sub(r"(=[\d.]+)?(\[.*\])?$", "", text) for text in texts]


def _tokens(ids: tuple[int, ...]) -> list[str]:
    return [f"token {number}" for number in ids]


def _is_quoted(text: str, problem: str) -> bool:
    """Whether a problem has a text as words of its own."""
    return (
        bool(text) and re.search(rf"(?<![\w/.-]){re.escape(text)}(?![\w/-])", problem) is not None
    )


# Options with dashes are those that an error proposes, or that the command line has.
_OPTION = r"(?<!--)\b[a-z]+\.\w+\b"
_OPTIONS = {
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(getattr(Config(), section.name))
}
_QUOTED: Mapping[str, Callable[[Any], list[str]]] = {
    **dict.fromkeys(("model.path", "adapter.continue_from", "train.output"), _paths),
    **dict.fromkeys(("data.train", "data.validation", "train.push_to_hub"), _paths),
    "adapter.trainable_tokens": _tokens,
}
"""Options whose values functions quote in errors that do not know the options."""
