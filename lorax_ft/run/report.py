"""Tables that a run prints: config, trainable modules, memory, first batch, answers, result."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorax_ft.config import Config
from lorax_ft.data.chat import Sample, describe_row
from lorax_ft.lowrank.layout import Layout
from lorax_ft.run.module_table import ModuleRow, base_count, describe_bytes, module_rows
from lorax_ft.tree import Tree

FILE_WIDTH = 120
"""Columns of output that goes to a file."""
TEXT_COLUMNS = ("module", "dtype", "sharding")
"""Columns of the table of modules that are aligned to the left; numbers are aligned to the right.
"""
LEFT_OUT = ("sharding", "dtype", "matrices", "scale", "shape")
"""Columns of the table of modules that a narrow terminal leaves out, the first one first."""
SHARDING_WIDTH = 20
"""The least width of the column of shardings, whose cells wrap."""
GAP = 2
"""Spaces between the columns of a table."""
EDGES = 2
"""Spaces at the left and the right of a table."""


def make_console() -> Console:
    """The console to print to. Only the first of several processes prints."""
    console = Console(highlight=False, quiet=jax.process_index() != 0)
    if console.is_terminal:
        return console
    if os.environ.get("COLUMNS"):
        return console
    # rich assumes 80 columns for a file, which breaks the tables.
    return Console(highlight=False, quiet=console.quiet, width=FILE_WIDTH)


def counted(number: int, noun: str) -> str:
    """A number of things, such as "1 row" or "2,000 rows"."""
    plural = "" if number == 1 else "s"
    return f"{number:,} {noun}{plural}"


def print_config(console: Console, config: Config) -> None:
    """Print the resolved config by section, with the values that are not defaults in bold."""
    sections = dataclasses.fields(config)
    title_width = max(len(section.name) for section in sections)
    grid = Table.grid(padding=(0, GAP))
    for section in sections:
        pairs = _named_values(getattr(config, section.name))
        text = _flowed(pairs, width=console.width - title_width - GAP)
        grid.add_row(Text(section.name, style="cyan"), text)
    console.print(grid)


def _named_values(options: Any) -> list[Text]:
    """The names and values of a section's options, those that are not defaults in bold."""
    pairs = []
    for field in dataclasses.fields(options):
        if field.metadata.get("deprecated"):
            continue
        value = getattr(options, field.name)
        style = "dim" if value == field.default else "bold"
        name = (f"{field.name} ", "dim")
        pairs.append(Text.assemble(name, (_option(value), style)))
    return pairs


def print_modules(console: Console, params: Tree, trained: Tree, *, layout: Layout) -> None:
    """Print the trainable modules, and what fraction of the parameters is trainable."""
    rows = module_rows(params, trained, layout=layout)
    columns = module_columns(rows, width=console.width)
    table = make_table("Trainable modules")
    for name, cells in columns.items():
        if name in TEXT_COLUMNS:
            # The names of modules are broken already (see `module_columns`).
            table.add_column(name, overflow="fold", no_wrap=name != "sharding")
        else:
            _add_numbers(table, name, cells)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    count = sum(row.parameters for row in rows)
    base = base_count(params)
    percent = 100 * count / base
    console.print(f"{count:,} trainable parameters, {percent:.3g}% of the base's {base:,}.")
    console.print(f"The base takes {describe_bytes(params)}.\n")


def module_columns(rows: Sequence[ModuleRow], *, width: int) -> dict[str, list[str]]:
    """The columns of the table of modules that fit into `width`, by their headers.

    No number is cut: columns are left out, then the names of modules are broken at their slashes.
    """
    columns: dict[str, list[str]] = {}
    for name in ModuleRow._fields:
        columns[name] = [_cell(getattr(row, name)) for row in rows]

    def needed() -> int:
        """The width of the table."""
        widths = {name: _column_width(name, cells) for name, cells in columns.items()}
        if "sharding" in widths:
            widths["sharding"] = min(widths["sharding"], SHARDING_WIDTH)
        gaps = GAP * (len(widths) - 1)
        return sum(widths.values()) + gaps + EDGES

    for name in LEFT_OUT:
        if needed() > width:
            del columns[name]
    # A terminal of a few columns gets a few letters a line.
    names = columns["module"]
    others = needed() - _column_width("module", names)
    left = max(width - others, 8)
    columns["module"] = [_broken(name, width=left) for name in names]
    return columns


def print_memory(console: Console, parts: Mapping[str, Any], *, temporaries: int) -> None:
    """Print the memory that a step takes on each device, by part.

    Args:
      console: where to print.
      parts: trees of arrays by name.
      temporaries: bytes that the compiled step allocates besides its arguments.
    """
    sizes = {}
    for name, tree in parts.items():
        leaves = jax.tree.leaves(tree)
        sizes[name] = sum(map(_device_bytes, leaves))
    sizes["activations, gradients and other temporaries"] = temporaries
    sizes["total"] = sum(sizes.values())
    table = make_table("Memory per device")
    table.add_column("part")
    megabytes = [f"{size / 1e6:,.1f}" for size in sizes.values()]
    _add_numbers(table, "MB", megabytes)
    for row in zip(sizes, megabytes, strict=True):
        table.add_row(*row)
    console.print(table)


def print_batch(
    console: Console,
    tokenizer: Any,
    rows: Sequence[Sequence[Sample]],
    *,
    most: int = 2,
) -> None:
    """Print the first rows of a batch as the model sees them, with the labeled tokens in green."""
    title = Text("First batch", style="bold")
    legend = Text("⟦marked⟧", style="green")
    console.print(title, "(labeled tokens are", legend, end=")\n")
    for row in rows[:most]:
        text = Text()
        for sample in row:
            for piece, labeled in describe_row(tokenizer, sample):
                # Brackets as well as color: a file shows no color.
                if labeled:
                    text.append(f"⟦{piece}⟧", style="green")
                else:
                    text.append(piece)
            text.append("\n")
        console.print(text)
    if len(rows) > most:
        console.print(f"… and {len(rows) - most} more rows.\n")


def print_answers(
    console: Console,
    title: str,
    questions: Sequence[str],
    columns: Mapping[str, Sequence[str]],
) -> None:
    """Print questions beside their answers."""
    table = make_table(title, show_lines=True)
    table.add_column("question", ratio=3, overflow="fold")
    for name in columns:
        table.add_column(name, ratio=2, overflow="fold")
    for i, question in enumerate(questions):
        # Text, because rich would read square brackets in an answer as markup.
        cells = [Text(question)]
        for answers in columns.values():
            cells.append(Text(answers[i]))
        table.add_row(*cells)
    console.print(table)


def print_summary(console: Console, rows: Sequence[tuple[str, str]], *, title: str) -> None:
    """Print names and values in two columns."""
    table = make_table(title, show_header=False)
    table.add_column("", style="bold")
    table.add_column("", overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def make_table(title: str, *, show_header: bool = True, show_lines: bool = False) -> Table:
    """An empty table in the style of all tables here."""
    return Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
        show_header=show_header,
        show_lines=show_lines,
    )


def _add_numbers(table: Table, name: str, cells: Sequence[str]) -> None:
    """Add a column of numbers, which a narrow terminal does not cut."""
    width = _column_width(name, cells)
    table.add_column(name, justify="right", no_wrap=True, min_width=width)


def _column_width(name: str, cells: Sequence[str]) -> int:
    """The width of the header and the cells of a column."""
    return max(map(len, [name, *cells]))


def _cell(value: str | int) -> str:
    """A cell's text; large numbers are read in groups of three digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return value


def _broken(path: str, *, width: int) -> str:
    """A slash path in lines of at most `width`, which end at slashes where they can."""
    lines = [""]
    # A component with its slash; one that is wider than a line comes in parts.
    components = re.findall(rf"[^/]{{1,{width - 1}}}/?", path)
    for component in components:
        length = len(lines[-1]) + len(component)
        if lines[-1] and length > width:
            lines.append("")
        lines[-1] += component
    return "\n".join(lines)


def _flowed(pairs: Sequence[Text], *, width: int) -> Text:
    """Names with their values, three spaces apart, without a line break inside a pair."""
    lines = [Text()]
    for pair in pairs:
        if lines[-1] and lines[-1].cell_len + 3 + pair.cell_len > width:
            lines.append(Text())
        if lines[-1]:
            lines[-1].append("   ")
        lines[-1].append_text(pair)
    joined = Text("\n").join(lines)
    joined.overflow = "fold"
    return joined


def _option(value: object) -> str:
    """The value of an option as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _device_bytes(leaf: Any) -> int:
    """The bytes of a leaf on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
