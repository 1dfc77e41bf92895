"""The config that a file of another trainer means, and what is to be said of it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lorax_ft.checks import one_line
from lorax_ft.config.document import Document
from lorax_ft.config.foreign import autotrain, llama_factory, peft, peft_types
from lorax_ft.config.foreign.rules import Keys, Options, Rule, Table, translate
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
    places: Mapping[str, str]
    """The place in the file, with the key, that each option comes from."""

    def remarks(self) -> list[tuple[str, str]]:
        """What a user should know of the translation: keys, and what became of them."""
        remarks = list(self.notes.items())
        by_reason: dict[str, list[str]] = {}
        for key, reason in self.unused.items():
            by_reason.setdefault(reason, []).append(key)
        remarks += [(", ".join(keys), f"not honored: {why}") for why, keys in by_reason.items()]
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
        named = re.match(r"\w+\.\w+", str(error))
        place = source.places.get(named[0]) if named and source else None
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
    config = _config({**trainer.beside, **translation.options}, translation.keys, document)
    return config, Source(
        path=document.path,
        trainer=trainer.name,
        notes=translation.notes,
        unused=translation.unused,
        batch_per_device=keys.batch_per_device and "train.batch_size" not in overridden,
        shards_weights=keys.shards_weights and "mesh.fsdp" not in overridden,
        places={name: _place(found[0], document) for name, found in translation.keys.items()},
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
    return dataclasses.replace(config, mesh=mesh, train=train), remarks


def _config(options: Options, keys: Mapping[str, Sequence[str]], document: Document) -> Config:
    """The config with these options."""
    sections: dict[str, dict[str, Any]] = {}
    for option, value in options.items():
        section, _, field = option.partition(".")
        sections.setdefault(section, {})[field] = value
    try:
        return Config.from_sections(sections)
    except ValueError as error:
        named = re.match(r"\w+\.\w+", str(error))
        found = keys.get(named[0], ()) if named else ()
        # Of several keys that set the option together, the one with its very value.
        shown = [key for key in found if f" is {document.values.get(key)!r}" in str(error)]
        place = _place([*shown, *found][0], document) if found else document.path
        # YAML and JSON have lists.
        message = str(error).replace("it must be a tuple", "it must be a list")
        raise ValueError(one_line(f"{place}: {message}")) from error


def _place(key: str, document: Document) -> str:
    """A key and where it is."""
    return f"{document.where(key)} ({key})"
