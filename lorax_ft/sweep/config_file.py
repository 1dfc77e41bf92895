"""A `Config` as a Python file that scripts/train.py takes. Imports no JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax_ft.config import Config


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
    lines = [f'"""{docstring}"""', "", f"from lorax_ft.config import {', '.join(names)}", "", ""]
    lines.append("def get_config() -> Config:")
    if not sections:
        lines.append("    return Config()")
    else:
        lines.append("    return Config(")
        for name, (section, values) in sections.items():
            lines.append(f"        {name}={type(section).__name__}(")
            for field, value in values.items():
                # Fields are numbers, strings, booleans and tuples of them, whose repr is Python.
                lines.append(f"            {field}={value!r},")
            lines.append("        ),")
        lines.append("    )")
    return "\n".join(lines) + "\n"


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
