"""Validation of user input; every error names the value, its place and what is allowed."""

from __future__ import annotations

import difflib
import json
import math
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lorax_ft import regexes

TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "True or False",
    type(None): "None",
}
"""Python types in the words of an error message."""


def check(condition: bool, message: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_types(config: Any) -> None:
    """Raise ValueError unless the value of every field has its annotated type."""
    for field, annotation in get_type_hints(type(config)).items():
        value = getattr(config, field)
        # The top-level Config has no section name of its own.
        option = f"{section_name(config)}.{field}".removeprefix(".")
        if _has_type(value, annotation):
            _check_size(value, option)
            continue
        message = f"{option} is {repr(value)[:200]}; it must be {_describe(annotation)}"
        matches = difflib.get_close_matches(str(value), _literals(annotation), n=1)
        if matches:
            message += f"; did you mean {matches[0]!r}?"
        raise ValueError(message)


def _check_size(value: Any, option: str) -> None:
    """Raise for a whole number that no array could hold, such as one of hundreds of digits."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int) and abs(number) >= 2**63:
            raise ValueError(f"{option} is {repr(number)[:40]}; it must be below 2^63")


def check_positive(config: Any, *fields: str) -> None:
    """Raise ValueError unless these fields are above 0 and finite."""
    for field in fields:
        value = getattr(config, field)
        check(
            0 < value < math.inf,
            f"{section_name(config)}.{field} is {value}; it must be above 0 and finite",
        )


def check_fraction(config: Any, *fields: str) -> None:
    """Raise ValueError unless these fields are between 0 and 1."""
    for field in fields:
        value = getattr(config, field)
        check(
            0 <= value <= 1,
            f"{section_name(config)}.{field} is {value}; it must be between 0 and 1",
        )


def divisors(number: int) -> list[int]:
    """The numbers that divide a number above 0, in ascending order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def alternatives(values: Sequence[object]) -> str:
    """Values as words.

    >>> alternatives([1, 2, 4])
    '1, 2 or 4'
    """
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def one_line(text: str) -> str:
    r"""A message whose values may hold line ends and control characters, which are escaped.

    >>> one_line("rank is a" + chr(10) + "b")
    'rank is a\\nb'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def section_name(config: Any) -> str:
    """The option prefix of a config: "adapter" for an `AdapterConfig`, "" for a `Config`."""
    return type(config).__name__.removesuffix("Config").lower()


def compile_pattern(pattern: str, option: str) -> Any:
    """Compile a regular expression that was given for `option`.

    Raises:
      ValueError: it is not a valid regular expression.
    """
    try:
        return regexes.compiled(pattern)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def parse_pattern(entry: str, field: str, number: type[int] | type[float]) -> tuple[str, float]:
    """Split an entry "pattern=value" of an adapter field; `number` parses the value.

    Raises:
      ValueError: the entry has another form, or the value is not above 0.
    """
    # A pattern may contain "=", a value may not.
    pattern, _, value = entry.rpartition("=")
    try:
        parsed = number(value)
    except ValueError:
        parsed = math.nan
    check(
        bool(pattern) and 0 < parsed < math.inf,
        f'adapter.{field}: {entry!r} is not of the form "pattern=value" with a value above 0',
    )
    compile_pattern(pattern, f"adapter.{field}")
    return pattern, parsed


def _has_type(value: Any, annotation: Any) -> bool:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return value in args
    if origin is tuple:  # always of the form tuple[item, ...]
        return isinstance(value, tuple) and all(_has_type(item, args[0]) for item in value)
    if origin in (Union, types.UnionType):
        return any(_has_type(value, choice) for choice in args)
    if annotation in (int, float):
        # A float field accepts an int. No number field accepts a bool, which is a subclass of int.
        return isinstance(value, int | annotation) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _literals(annotation: Any) -> list[str]:
    """The values that an annotation names, also inside a union."""
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in args]
    return [literal for choice in args for literal in _literals(choice)]


def _describe(annotation: Any) -> str:
    """The annotation in the words of an error message."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        named = ", ".join(map(str, args))
        return named if len(args) == 1 else f"one of {named}"
    if origin is tuple:
        return f"a tuple, each entry {_describe(args[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, args))
    return TYPE_NAMES.get(annotation, annotation.__name__)


def parse_template_args(entries: Sequence[str], option: str) -> dict[str, Any]:
    """The variables of a chat template, each "name=value"; a value that is no JSON is text.

    Raises:
      ValueError: an entry has another form.

    >>> parse_template_args(["enable_thinking=false", "effort=low"], "template_args")
    {'enable_thinking': False, 'effort': 'low'}
    """
    parsed: dict[str, Any] = {}
    for entry in entries:
        if re.fullmatch(r"\w+=.+", entry) is None:
            raise ValueError(f'{option}: {entry!r} is not of the form "name=value"')
        name, text = entry.split("=", 1)
        # As Python writes them.
        literal = {"True": "true", "False": "false", "None": "null"}.get(text, text)
        try:
            parsed[name] = json.loads(literal)
        except ValueError:
            parsed[name] = text
    return parsed
