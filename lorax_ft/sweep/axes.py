"""What a sweep varies: the fields of a `Config`, their values, and the points of their product.

    optim.learning_rate=1e-4,3e-4,1e-3      three values
    optim.learning_rate=1e-5..1e-2:9        nine values from 1e-5 to 1e-2
    optim.learning_rate=1e-5..1e-2          a range, from which an optimizer of settings draws

Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_ft import cli
from lorax_ft.config import Config
from lorax_ft.options import advice, options, takes_several
from lorax_ft.program import command

RATE = "optim.learning_rate"
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})(?::(\d+))?")
DIGITS = 4
"""Significant digits of the values of a range, so that a config file can be read."""
MOST_POINTS = 10_000

Settings = Mapping[str, Any]
"""The value of each varied field, by its name, such as "optim.learning_rate"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """A field and its values."""

    field: str
    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """A field and the lowest and the highest of its values."""

    field: str
    low: float
    high: float
    is_integer: bool

    @property
    def is_log(self) -> bool:
        """Whether values are spaced evenly by their logarithm."""
        return self.low > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One of the runs of a sweep."""

    number: int
    """From 0, in the order of the sweep."""
    settings: Settings
    config: Config
    """The whole config, which `lorax_ft.train` takes."""

    @property
    def name(self) -> str:
        """The settings in words, such as "optim.learning_rate 0.001, train.seed 0"."""
        return describe(self.settings)


def parse_axes(entries: Sequence[str]) -> list[Axis | Range]:
    """The axes of entries "section.field=v1,v2", "section.field=low..high:count" or "…=low..high".

    Raises:
      ValueError: an entry has another form, its field is unknown or twice, or a value does not fit.
    """
    axes: list[Axis | Range] = []
    for entry in entries:
        try:
            field, text = _split(entry)
            axis = _parse_axis(field, _kind(field), text)
        except ValueError as error:
            raise ValueError(f"--sweep {error}") from None
        if any(other.field == field for other in axes):
            raise ValueError(f"--sweep names {field} twice; give all its values after one name")
        axes.append(axis)
    if not axes:
        raise ValueError(
            "--sweep is missing: name what varies, such as --sweep optim.learning_rate=1e-4,1e-3"
        )
    return axes


def parse_setting(entry: str) -> tuple[str, Any]:
    """The field and the value of "section.field=value".

    Raises:
      ValueError: the entry has another form, its field is unknown, or the value does not fit.
    """
    field, text = _split(entry)
    return field, _parse_value(field, _kind(field), text)


def product(config: Config, axes: Sequence[Axis]) -> list[Point]:
    """The points of all combinations of the axes' values; the last axis varies fastest.

    Raises:
      ValueError: a combination is not a valid config.
    """
    fields = [axis.field for axis in axes]
    lists = [axis.values for axis in axes]
    # Counted before any is made: a slip such as 1..1000000:1000000 would take minutes.
    count = math.prod(map(len, lists))
    if count > MOST_POINTS:
        raise ValueError(f"the sweep has {count:,} points; give fewer values")
    points = []
    for number, values in enumerate(itertools.product(*lists)):
        settings = dict(zip(fields, values, strict=True))
        try:
            points.append(make_point(config, settings, number=number))
        except ValueError as error:
            raise ValueError(f"--sweep at {error}") from None
    return points


def make_point(config: Config, settings: Settings, *, number: int) -> Point:
    """The config with these settings.

    Raises:
      ValueError: they are not valid together.
    """
    # Sections are replaced with all their values at once, since each is checked as a whole: a value
    # may be valid only together with another one.
    sections: dict[str, dict[str, Any]] = {}
    for field, value in settings.items():
        section, _, name = field.partition(".")
        sections.setdefault(section, {})[name] = value
    changed: dict[str, Any] = {}
    try:
        for section, values in sections.items():
            changed[section] = dataclasses.replace(getattr(config, section), **values)
        point_config = dataclasses.replace(config, **changed)
    except ValueError as error:
        raise ValueError(f"{describe(settings)}: {error}") from error
    return Point(number=number, settings=settings, config=point_config)


def describe(settings: Settings) -> str:
    """Settings in words, such as "optim.learning_rate 0.001, train.seed 0"."""
    parts = []
    for field, value in settings.items():
        parts.append(f"{field} {describe_value(value)}")
    return ", ".join(parts)


def describe_value(value: Any) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def rounded(value: float) -> float:
    """The value with `DIGITS` significant digits.

    >>> rounded(0.000316227766)
    0.0003162
    """
    return float(f"{value:.{DIGITS}g}")


def _split(entry: str) -> tuple[str, str]:
    """The field of an entry, and what stands behind the "="."""
    field, equals, text = entry.partition("=")
    if not (field and equals and text):
        raise ValueError(f'{entry!r} is not of the form "section.field=value,value"')
    # As an option is written, "--optim.learning-rate", is fine too.
    return field.removeprefix("--").replace("-", "_"), text


def _kind(field: str) -> Any:
    """The type of a field.

    Raises:
      ValueError: there is no such field; the error names the nearest one.
    """
    known = options(Config)
    if field == RATE:
        return float  # a sweep has no rate to find
    if field in known:
        return known[field]
    # As `lorax-ft train` answers to names of another trainer, such as per_device_train_batch_size.
    message = advice([f"--{field}"], Config)
    if message is None:
        near = difflib.get_close_matches(field, known, n=1)
        message = f"Unrecognized option: --{field}"
        message += (
            f"; did you mean {near[0]}?" if near else f"; {command('train')} --help lists all"
        )
    raise ValueError(f"{field}: {message}")


def _parse_axis(field: str, kind: Any, text: str) -> Axis | Range:
    """The axis of a field of this type."""
    found = RANGE.fullmatch(text)
    # Of another field, such as one of paths, ".." is a part of the value.
    if found is not None and kind in (int, float):
        return _parse_range(field, kind, *found.groups())
    values = []
    for part in text.split(","):
        values.append(_parse_value(field, kind, part.strip()))
    # A value given twice would train the same run twice.
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{field} has the value {describe_value(value)} twice")
    return Axis(field=field, values=tuple(values))


def _parse_range(field: str, kind: type, first: str, last: str, count: str | None) -> Axis | Range:
    """The axis of "first..last:count", or the range "first..last"."""
    low, high = float(first), float(last)
    if not low < high:
        raise ValueError(f"{field}={first}..{last}: the second number must be the larger")
    found = Range(field=field, low=low, high=high, is_integer=kind is int)
    if count is None:
        return found
    if int(count) < 2:
        raise ValueError(f"{field}={first}..{last}:{count}: give 2 values or more")
    # A dict, as a set that keeps the order.
    values: dict[float, None] = {}
    for i in range(int(count)):
        share = i / (int(count) - 1)  # 0 at low, 1 at high
        value = low + share * (high - low)
        if found.is_log:
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        # Neighbors that are rounded to the same value are one.
        value = round(value) if kind is int else rounded(value)
        values[value] = None
    return Axis(field=field, values=tuple(values))


def _parse_value(field: str, kind: Any, text: str) -> Any:
    """One value, parsed as `lorax-ft train` parses it."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{field}: {text!r} is not true or false")
        return text.lower() == "true"
    section, _, name = field.partition(".")
    # A class of this field alone: the checks of the whole config come when the point is made.
    inner = dataclasses.make_dataclass("Section", [(name, kind)], frozen=True, kw_only=True)
    outer = dataclasses.make_dataclass("Value", [(section, inner)], frozen=True, kw_only=True)
    # "=" keeps a value that starts with a dash from looking like an option. A field of several
    # values takes them as arguments of their own, such as "q_proj v_proj".
    arguments = [f"--{field}={text}"]
    if takes_several(kind):
        arguments = [f"--{field}", *text.split()]
    try:
        parsed: Any = cli.parse(outer, argv=arguments)
    except ValueError as error:
        reason = str(error).removesuffix("; --help lists all options")
        raise ValueError(f"{field}={text}: {reason}") from None
    return getattr(getattr(parsed, section), name)
