"""The examples of a split: what rows of its sources become, one by one."""

from __future__ import annotations

import dataclasses
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from lorax_ft.config import DataConfig
from lorax_ft.data.bad_rows import STOP, BadRows
from lorax_ft.data.conversation import Conversation, Example, PlainText
from lorax_ft.data.formats import Defaults, to_example
from lorax_ft.data.rows import Row
from lorax_ft.data.shapes import Shape, detect_shape, fitting_shape
from lorax_ft.data.sources import read_rows
from lorax_ft.data.tools import read_tools
from lorax_ft.data.usage import optional_fields

NumberedRows = Iterable[tuple[int, Row]]
"""Rows, each with the number of its set."""


@dataclasses.dataclass(kw_only=True)
class Seen:
    """What is noted of the examples while they are read; they are not kept in memory."""

    sets: array[int] = dataclasses.field(default_factory=lambda: array("l"))
    """The number of each example's set."""
    documents: array[int] = dataclasses.field(default_factory=lambda: array("b"))
    """Whether each example is a text without a prompt."""
    hashes: array[int] = dataclasses.field(default_factory=lambda: array("q"))
    """A hash of 64 bits of each example, by which copies are counted."""
    empty: int = 0
    """Texts that are empty."""
    unused: Counter[str] = dataclasses.field(default_factory=Counter)
    """Columns that no example contains."""
    fields: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    """What conversations have that not every template reads (`optional_fields`)."""
    examples: list[Example] | None = None
    """The examples, if they are kept."""
    bad: BadRows = dataclasses.field(default_factory=BadRows)
    """What happens to rows that cannot be used, and those that were met."""


def numbered_rows(
    paths: Sequence[str],
    split: str,
    config: DataConfig,
    *,
    limit: int | None = None,
    bad: BadRows = STOP,
) -> Iterator[tuple[int, Row]]:
    """Yields the rows of all sources, each with its source's number."""

    def numbered() -> Iterator[tuple[int, Row]]:
        for number, path in enumerate(paths):
            for row in read_rows([path], split=split, revision=config.revision, bad=bad):
                yield number, row

    return itertools.islice(numbered(), limit)


def examples_of(
    rows: NumberedRows, config: DataConfig, seen: Seen
) -> Iterator[tuple[Example, str]]:
    """Yields the examples that rows become, each with its place."""
    defaults = _defaults(config)
    usual_shapes: dict[int, Shape] = {}
    for number, row in rows:
        try:
            shape = _shape_of(row, number, usual_shapes, config)
            example = to_example(
                row, shape=shape, fields=config.fields, defaults=defaults, unused=seen.unused
            )
        except ValueError as error:
            seen.bad.met(error)
            continue
        except RecursionError:
            seen.bad.met(ValueError(f"{row.where}: the row is nested too deeply"))
            continue
        # Text corpora have empty lines; they would teach the model to end at once.
        if isinstance(example, PlainText) and not example.completion.strip():
            seen.empty += 1
            continue
        seen.sets.append(number)
        seen.documents.append(isinstance(example, PlainText) and not example.prompt)
        seen.hashes.append(hash(repr(example)))
        if isinstance(example, Conversation):
            seen.fields.update(optional_fields(example))
        if seen.examples is not None:
            seen.examples.append(example)
        yield example, row.where


def _shape_of(row: Row, number: int, usual: dict[int, Shape], config: DataConfig) -> Shape:
    """The format of a row of the set `number`; `usual` has the formats of the sets so far."""
    if config.shape != "auto":
        return config.shape
    if number in usual:
        return fitting_shape(row, usual=usual[number], fields=config.fields)
    # The rows of a set are expected to have the format of its first one.
    usual[number] = detect_shape(row, fields=config.fields)
    return usual[number]


def _defaults(config: DataConfig) -> Defaults:
    """What the options give to conversations that have none of their own."""
    tools = None
    if config.tools is not None:
        tools = read_tools(config.tools, "data.tools")
    return Defaults(system=config.system, tools=tools, template_args=config.parsed_template_args())
