"""Checks of values that a person writes, with errors that name the value, its place and what it must be."""

from __future__ import annotations

import difflib
import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check(condition: bool, message: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


def section(config: Any) -> str:
    """The section of the run that a config is, as its options are called: `adapter` for an AdapterConfig."""
    return type(config).__name__.removesuffix("Config").lower()


def typed(config: Any) -> None:
    """Raise unless every field holds what its annotation says."""
    for field, kind in get_type_hints(type(config)).items():
        value = getattr(config, field)
        if not _fits(value, kind):
            near = difflib.get_close_matches(
                str(value), [str(choice) for choice in get_args(kind)], n=1
            )
            meant = f"; did you mean {near[0]!r}?" if near else ""
            where = ".".join(part for part in (section(config), field) if part)
            raise ValueError(f"{where} is {value!r}; it must be {_spelled(kind)}{meant}")


def positive(config: Any, *fields: str) -> None:
    """Raise unless these fields are above 0 and finite."""
    for field in fields:
        value = getattr(config, field)
        check(
            math.isfinite(value) and value > 0,
            f"{section(config)}.{field} is {value}; it must be above 0 and finite",
        )


def within(config: Any, *fields: str) -> None:
    """Raise unless these fields lie between 0 and 1."""
    for field in fields:
        value = getattr(config, field)
        check(0 <= value <= 1, f"{section(config)}.{field} is {value}; it must lie between 0 and 1")


def regex(pattern: str, where: str) -> re.Pattern[str]:
    """The compiled pattern."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is not a regular expression: {error}") from error


def pattern_value(entry: str, field: str, number: type[int] | type[float]) -> tuple[str, float]:
    """The parts of "pattern=value"."""
    pattern, equals, value = entry.rpartition("=")
    try:
        parsed = number(value)
        valid = bool(equals and pattern) and math.isfinite(parsed) and parsed > 0
    except ValueError:
        valid = False
    check(
        valid, f'adapter.{field}: {entry!r} is not of the form "pattern=value" with a value above 0'
    )
    regex(pattern, f"adapter.{field}")
    return pattern, parsed


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if kind in (int, float):  # a bool is an int in Python's eyes
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _spelled(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a tuple, each entry {_spelled(inner[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_spelled, inner))
    known = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "True or False",
        type(None): "None",
    }
    return known.get(kind, kind.__name__)
