"""Checks of values that a person writes, with errors that name the value, its place and what it must be."""

from __future__ import annotations

import math
import re
from typing import Any


def check(condition: bool, message: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


def section(config: Any) -> str:
    """The section of the run that a config is, as its options are called: `adapter` for an AdapterConfig."""
    return type(config).__name__.removesuffix("Config").lower()


def positive(config: Any, *fields: str) -> None:
    """Raise unless these fields are above 0 and finite."""
    for field in fields:
        value = getattr(config, field)
        check(
            math.isfinite(value) and value > 0, f"{section(config)}.{field} is {value}; it must be above 0 and finite"
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
    check(valid, f'adapter.{field}: {entry!r} is not of the form "pattern=value" with a value above 0')
    regex(pattern, f"adapter.{field}")
    return pattern, parsed
