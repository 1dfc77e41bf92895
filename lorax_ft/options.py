"""The options of a dataclass on a command line: which are given twice, and what an unknown one is.

Imports no JAX. tyro names the option of a nested field "--section.field", and takes dashes for
underscores; here names have underscores and no leading dashes.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Union

from lorax_ft.option_names import INFERENCE, TRAINING


def options(args_type: type) -> dict[str, Any]:
    """The type of each option of a dataclass, by its name, such as "optim.learning_rate"."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(args_type)
    for field in dataclasses.fields(args_type):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            section = options(typing.cast(type, hint))
            for name, inner in section.items():
                found[f"{field.name}.{name}"] = inner
        else:
            found[field.name] = hint
    return found


def given_options(argv: Sequence[str]) -> set[str]:
    """The names of the options on a command line."""
    return {name for name, _ in _given(argv)}


def check_given_once(argv: Sequence[str], args_type: type) -> None:
    """Raises ValueError if an option is given twice; the last one would win without a word."""
    known = options(args_type)
    given: dict[str, str] = {}
    for name, values in _given(argv):
        option = _positive(name, known)
        if option not in known:
            continue
        shown = shlex.join(values)
        if option != name:
            shown = "no"  # --section.no-flag
        if option in given:
            raise ValueError(_twice(option, given[option], shown, known[option]))
        given[option] = shown


def advice(argv: Sequence[str], args_type: type) -> str | None:
    """What to give instead of unknown options whose names are familiar; None if there are none.

    A familiar name is that of another trainer (see `option_names`) or the last part of one of ours.
    """
    known = options(args_type)
    unknown: list[str] = []
    replaced: list[str] = []
    for name, _ in _given(argv):
        # tyro answers --help itself.
        if _positive(name, known) in known or name == "help":
            continue
        unknown.append(f"--{name}")
        replacement = _replacement(name, known)
        if replacement is None:
            continue
        option, _, note = replacement.partition("; ")
        line = f"{option} for --{name}"
        if note:
            line += f" ({note})"
        replaced.append(line)
    if not replaced:
        return None
    plural = "s" if len(unknown) > 1 else ""
    names = ", ".join(unknown)
    instead = ", ".join(replaced)
    return f"Unrecognized option{plural}: {names}; use {instead}"


def flag_with_value(argv: Sequence[str], args_type: type) -> str | None:
    """The error of a flag that got a value, such as "--adapter.dora True"; None if there is none.

    Raises no error itself, as tyro may have found another mistake.
    """
    known = options(args_type)
    for name, values in _given(argv):
        if known.get(name) is not bool or len(values) != 1:
            continue
        # Another value may be a positional argument that follows the flag.
        if _is_boolean(values[0]):
            section, dot, flag = name.rpartition(".")
            opposite = f"--{section}{dot}no-{flag}"
            return f"--{name} takes no value; give --{name} to turn it on, {opposite} for off"
    return None


def wrong_value(argv: Sequence[str], args_type: type) -> str | None:
    """The error of an option that has no value, or one of the wrong type; None if there is none."""
    known = options(args_type)
    for name, values in _given(argv):
        if name not in known or known[name] is bool:
            continue
        hint = known[name]
        several = typing.get_origin(hint) is tuple
        if several:
            hint = typing.get_args(hint)[0]
        elif not values:
            return f"--{name} needs a value: {_takes(hint)}"
        # What follows the value of an option may be a question (lorax-ft generate).
        for value in values if several else values[:1]:
            if _fits(value, hint):
                continue
            problem = f"--{name} is {value!r}; it takes {_takes(hint)}"
            if several and value.lower() == "none":
                problem += f"; give --{name} without a value for none"
            return problem
    return None


def _given(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The options on a command line in their order, each with its values."""
    given: list[tuple[str, list[str]]] = []
    for argument in argv:
        option = re.match(r"--([A-Za-z][\w.-]*)(=|$)", argument)
        if option is None:
            # A value of the option before it.
            if given:
                _, values = given[-1]
                values.append(argument)
            continue
        written, equals = option.groups()
        name = written.replace("-", "_")
        values = []
        if equals:
            values.append(argument[option.end() :])
        given.append((name, values))
    return given


def _positive(name: str, known: Mapping[str, Any]) -> str:
    """The flag that "no_flag" switches off; every other name as it is."""
    section, dot, last = name.rpartition(".")
    flag = section + dot + last.removeprefix("no_")
    if name not in known and known.get(flag) is bool:
        return flag
    return name


def _twice(option: str, first: str, second: str, hint: Any) -> str:
    """The error of an option that is given twice."""
    if hint is bool and first == second:
        return f"--{option} is given twice; give it once"
    if hint is bool:
        return f"--{option} is given twice, once with no-; give one of them"
    nothing = "without a value"
    values = f"first {first or nothing}, then {second or nothing}"
    if takes_several(hint):
        together = f"{first} {second}".strip()
        return (
            f"--{option} is given twice: {values}; "
            f"all its values follow one name: --{option} {together}"
        )
    return f"--{option} is given twice: {values}; give it once"


def takes_several(hint: Any) -> bool:
    """Whether an option of this type takes any number of values."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(takes_several(choice) for choice in typing.get_args(hint))
    return typing.get_origin(hint) is tuple


def _replacement(name: str, known: Mapping[str, Any]) -> str | None:
    """Options of ours, with a note perhaps, for an unknown name; None if the name says nothing."""
    _, _, last = name.rpartition(".")
    for table in (TRAINING, INFERENCE):
        for familiar in (name, last):
            line = table.get(familiar)
            # Scripts have different options.
            if line is not None and _option(line) in known:
                return line
    namesakes = []
    for option in known:
        _, _, own_last = option.rpartition(".")
        if own_last == last:
            namesakes.append(f"--{option}")
    return " or ".join(namesakes) or None


def _option(line: str) -> str:
    """The name of the first option of a line of the tables."""
    options_of_line, _, _ = line.partition(";")
    first, *_ = options_of_line.split()
    return first.removeprefix("--")


def _fits(value: str, hint: Any) -> bool:
    """Whether a value on the command line has the type of its option."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in choices)
    if typing.get_origin(hint) is typing.Literal:
        return value in choices
    if hint is types.NoneType:
        return value == "None"
    if hint not in (int, float):
        return True
    try:
        hint(value)
    except ValueError:
        return False
    return True


def _takes(hint: Any) -> str:
    """What an option of this type takes, in words."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        # None is the default of most options that take it, so it comes last.
        ordered = sorted(choices, key=lambda choice: choice is types.NoneType)
        return " or ".join(map(_takes, ordered))
    if typing.get_origin(hint) is typing.Literal:
        *others, last = map(str, choices)
        return f"{', '.join(others)} or {last}" if others else last
    words = {int: "a whole number", float: "a number", types.NoneType: "None"}
    return words.get(hint, "text")


def _is_boolean(value: str) -> bool:
    return value.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0")
