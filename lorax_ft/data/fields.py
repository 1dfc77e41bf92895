"""The fields of a row or of a turn, under the names that a format expects.

A field that is null counts as absent: Arrow files write null for what a row does not have.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# These fields belong to a turn inside the list of messages, not to the row itself. ShareGPT writes
# from and value in place of role and content.
TURN_SYNONYMS: dict[str, tuple[str, ...]] = {
    "role": ("from",),
    "content": ("value",),
    "reasoning_content": ("reasoning", "thinking"),
    "tool_calls": (),
    "train": ("weight",),
}
ROW_FIELDS = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "question",
    "answer",
    "prompt",
    "completion",
    "text",
    "system",
    "tools",
    "documents",
    "chat_template_kwargs",
)
LISTS = ("messages", "conversations")
"""The fields of a row that hold turns."""


class Renames(NamedTuple):
    """Actual field names by the names that the format expects."""

    row: dict[str, str]
    turn: dict[str, str]


class Fields:
    """Reads the fields of a row or a turn, and remembers which ones were read.

    Args:
      values: the row or the turn.
      where: its place, for errors.
      renames: actual names by expected names.
      synonyms: further names of expected fields, used if the expected one is absent.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        *,
        renames: Mapping[str, str],
        synonyms: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.values = values
        self.where = where
        self.used: set[str] = set()
        self._renames = renames
        self._synonyms = synonyms
        for name, actual in renames.items():
            if actual not in values and name in values:
                _check_direction(name, actual, where)

    def check_renamed(self, name: str) -> None:
        """Raise if the data does not have the field that a rename refers to."""
        actual = self._renames[name]
        if actual not in self.values:
            raise ValueError(
                f"{self.where}: data.fields {name}={actual}: the row has no field {actual!r}; "
                f"it has {list_names(self.values)}"
            )

    def names(self, name: str) -> tuple[str, ...]:
        """The names under which an expected field may stand."""
        if name in self._renames:
            return (self._renames[name],)
        return (name, *self._synonyms.get(name, ()))

    def find(self, name: str) -> str | None:
        """The name under which an expected field stands; None if it is absent."""
        for actual in self.names(name):
            if self.values.get(actual) is not None:
                return actual
        return None

    def get(self, name: str) -> Any:
        """The value of an expected field; None if it is absent."""
        actual = self.find(name)
        if actual is None:
            return None
        self.used.add(actual)
        return self.values[actual]

    def require(self, name: str) -> Any:
        """The value of an expected field.

        Raises:
          ValueError: it is absent.
        """
        value = self.get(name)
        if value is not None:
            return value
        for actual in self.names(name):
            if actual in self.values:
                raise ValueError(f"{self.where}: {actual} is null; remove or complete the row")
        missing = self._renames.get(name, name)
        meant = self._nearest(name, missing)
        advice = "complete or remove the row, or give another --data.shape"
        if meant is not None:
            advice = f"name the right one with --data.fields {name}={meant}"
        raise ValueError(
            f"{self.where}: no field {missing!r}; it has {list_names(self.values)}; {advice}"
        )

    def text(self, name: str) -> str:
        """The text of an expected field."""
        return check_text(self.require(name), self._said_name(name), self.where)

    def optional_text(self, name: str) -> str:
        """The text of an expected field; empty if the field is absent."""
        if self.find(name) is None:
            return ""
        return self.text(name)

    def items(self, name: str) -> list[Any]:
        """The list of an expected field, which may be JSON text."""
        actual = self._said_name(name)
        value = parse_json(self.require(name), actual, self.where)
        value = _rows_of_columns(value)
        if not isinstance(value, list):
            raise ValueError(f"{self.where}: {actual} is {type_name(value)}, not a list")
        return value

    def _nearest(self, name: str, missing: str) -> str | None:
        """The field that may be meant by a missing one: the closest name, or the only one left.

        NAME if there are several; None if there is none of the type.
        """
        near = difflib.get_close_matches(missing, list(self.values), n=1)
        if near:
            return near[0]
        others = []
        for other, value in self.values.items():
            is_list = isinstance(value, list)
            has_type = is_list if name in LISTS else isinstance(value, str)
            if has_type and other not in self.used:
                others.append(other)
        if not others:
            return None
        return others[0] if len(others) == 1 else "NAME"

    def _said_name(self, name: str) -> str:
        """The name of a field for errors: the data's own, if the field is there."""
        return self.find(name) or name


@functools.lru_cache(maxsize=16)
def parse_renames(entries: tuple[str, ...]) -> Renames:
    """Parses the "expected=actual" entries of `data.fields`.

    Raises:
      ValueError: no format has such a field.
    """
    turn_names = _turn_names()
    known = [*ROW_FIELDS, *turn_names]
    renames = Renames(row={}, turn={})
    for entry in entries:
        name, actual = entry.split("=", 1)
        if name in turn_names:
            renames.turn[turn_names[name]] = actual
        elif name in ROW_FIELDS:
            renames.row[name] = actual
        elif actual in known:
            _check_direction(name, actual, "")
        else:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"known: {', '.join(known)}"
            if near:
                hint = f"did you mean {near[0]!r}?"
            raise ValueError(f"data.fields: no shape has a field {name!r}; {hint}")
    return renames


def parse_json(value: Any, name: str, where: str) -> Any:
    """Returns a value, parsed if it is text, as in the columns of CSV and Parquet files.

    Raises:
      ValueError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        shown = value if len(value) <= 40 else value[:37] + "..."
        raise ValueError(
            f"{where}: {name} is text that is not JSON ({shown!r}); give JSON"
        ) from error


def check_text(value: Any, name: str, where: str) -> str:
    """Returns a text that the tokenizer takes.

    Raises:
      ValueError: the value is not text, or not valid Unicode.
    """
    if not isinstance(value, str):
        hint = ""
        if isinstance(value, int | float):
            hint = f'; write it as text, such as "{value}"'
        raise ValueError(f"{where}: {name} is {type_name(value)}, not text{hint}")
    try:
        # JSON can escape half of a surrogate pair ("\ud800"), which the tokenizer would reject
        # much later, without the place.
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} contains an unpaired surrogate, which is not valid Unicode text; "
            "remove it"
        ) from error
    return value


def type_name(value: Any) -> str:
    """A value's type, as an error names it."""
    return "null" if value is None else type(value).__name__


def list_names(fields: Mapping[str, Any]) -> str:
    """The names of fields, as an error lists them."""
    return ", ".join(fields) or "none"


@functools.cache
def _turn_names() -> dict[str, str]:
    """The fields of a turn that can be renamed, by all of their names."""
    names = {}
    for name, synonyms in TURN_SYNONYMS.items():
        names[name] = name
        for synonym in synonyms:
            names[synonym] = name
    return names


def _check_direction(name: str, actual: str, where: str) -> None:
    """Raise for a rename that was written as "actual=expected"."""
    if actual not in ROW_FIELDS and actual not in _turn_names():
        return
    place = f"{where}: " if where else ""
    raise ValueError(
        f"{place}data.fields {name}={actual} is the wrong way round: it is expected=actual, the "
        f"data's own name last; give --data.fields {actual}={name}"
    )


def _rows_of_columns(value: Any) -> Any:
    """Turns an object of equally long lists into a list of objects.

    `datasets` loads a list of objects that way if its features declare a Sequence of a dict.
    """
    if not isinstance(value, dict) or not value:
        return value
    columns: Sequence[Any] = list(value.values())
    if not all(isinstance(column, list) for column in columns):
        return value
    if len({len(column) for column in columns}) != 1:
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
