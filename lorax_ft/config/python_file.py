"""A `Config` as a Python file that `lorax-ft train` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax_ft.config.run import Config

WIDTH = 100
"""Columns of a line, as ruff's of the files in configs/."""


def config_file(config: Config, *, docstring: str) -> str:
    """The text of a config file whose `get_config()` returns this config.

    Only values that are not defaults are written.

    >>> print(config_file(Config(), docstring="The defaults."))
    \"\"\"The defaults.\"\"\"
    <BLANKLINE>
    from lorax_ft.config import Config
    <BLANKLINE>
    <BLANKLINE>
    def get_config() -> Config:
        return Config()
    <BLANKLINE>
    """
    sections = _changed_sections(config)
    classes = {"Config"}
    for section, _ in sections.values():
        classes.add(type(section).__name__)
    # The order of ruff's import sorting, so that the file passes a linter as it is.
    names = sorted(classes)
    text = docstring.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    lines = [f'"""{text}"""', "", *_import(names), "", ""]
    lines.append("def get_config() -> Config:")
    if not sections:
        lines.append("    return Config()")
    else:
        lines.append("    return Config(")
        for name, (section, values) in sections.items():
            lines.extend(_section(f"{name}={type(section).__name__}", values, " " * 8))
        lines.append("    )")
    return "\n".join(lines) + "\n"


def _import(names: list[str]) -> list[str]:
    line = f"from lorax_ft.config import {', '.join(names)}"
    if len(line) <= WIDTH:
        return [line]
    return ["from lorax_ft.config import (", *(f"    {name}," for name in names), ")"]


def _section(start: str, values: Mapping[str, Any], indent: str) -> list[str]:
    """The lines of a section: one, if it is short."""
    arguments = ", ".join(f"{field}={_literal(value)}" for field, value in values.items())
    line = f"{indent}{start}({arguments}),"
    if len(line) <= WIDTH:
        return [line]
    lines = [f"{indent}{start}("]
    for field, value in values.items():
        lines.extend(_argument(field, value, indent + "    "))
    return [*lines, f"{indent}),"]


def _argument(field: str, value: Any, indent: str) -> list[str]:
    """The lines of a field and its value."""
    line = f"{indent}{field}={_literal(value)},"
    if len(line) <= WIDTH or not isinstance(value, tuple):
        return [line]
    items = [f"{indent}    {_literal(item)}," for item in value]
    return [f"{indent}{field}=(", *items, f"{indent}),"]


def _literal(value: Any) -> str:
    """A number, a text, a boolean, None or a tuple of them in Python, as ruff formats it."""
    if isinstance(value, tuple):
        items = ", ".join(map(_literal, value))
        return f"({items},)" if len(value) == 1 else f"({items})"
    text = repr(value)
    if isinstance(value, str) and text.startswith("'") and '"' not in text:
        return f'"{text[1:-1]}"'
    return text


def _changed_sections(config: Config) -> Mapping[str, tuple[Any, dict[str, Any]]]:
    """The sections with values that are not defaults, each with those values."""
    sections = {}
    for section_field in dataclasses.fields(config):
        section = getattr(config, section_field.name)
        values = {}
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if value != field.default:
                values[field.name] = value
        if values:
            sections[section_field.name] = (section, values)
    return sections
