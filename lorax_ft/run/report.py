"""Tables that a run prints: config, trainable modules, memory, first batch, answers, result."""

from __future__ import annotations

import dataclasses
import math
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
WIDE = 100
"""Columns that the whole table of modules needs; a narrower terminal gets fewer columns."""
WIDE_ONLY = ("matrices", "dtype", "sharding")
"""Columns of the table of modules that a narrow terminal leaves out."""


def make_console() -> Console:
    """The console to print to. Only the first of several processes prints."""
    console = Console(highlight=False, quiet=jax.process_index() != 0)
    if console.is_terminal:
        return console
    # rich assumes 80 columns for a file, which breaks the tables.
    return Console(highlight=False, quiet=console.quiet, width=FILE_WIDTH)


def print_config(console: Console, config: Config) -> None:
    """Print the resolved config by section, with the values that are not defaults in bold."""
    grid = Table.grid(padding=(0, 2))
    for section in dataclasses.fields(config):
        options = getattr(config, section.name)
        text = Text()
        for field in dataclasses.fields(options):
            if field.metadata.get("deprecated"):
                continue
            value = getattr(options, field.name)
            style = "dim" if value == field.default else "bold"
            text.append(f"{field.name} ", style="dim")
            text.append(_option(value), style=style)
            text.append("   ")
        grid.add_row(Text(section.name, style="cyan"), text)
    console.print(grid)


def print_modules(console: Console, params: Tree, trained: Tree, *, layout: Layout) -> None:
    """Print the trainable modules, and what fraction of the parameters is trainable."""
    rows = module_rows(params, trained, layout=layout)
    table = _make_table("Trainable modules")
    names = list(ModuleRow._fields)
    if console.width < WIDE:
        names = [name for name in names if name not in WIDE_ONLY]
    for name in names:
        # Text is aligned to the left, numbers to the right.
        justify: Any = "left" if name in ("module", "dtype", "sharding") else "right"
        table.add_column(name, justify=justify, no_wrap=name != "sharding", overflow="fold")
    for row in rows:
        cells = row._asdict() | {"parameters": f"{row.parameters:,}"}
        table.add_row(*(cells[name] for name in names))
    console.print(table)
    count = sum(row.parameters for row in rows)
    base = base_count(params)
    percent = 100 * count / base
    console.print(f"{count:,} trainable parameters, {percent:.3g}% of the base's {base:,}.")
    console.print(f"The base takes {describe_bytes(params)}.\n")


def print_memory(console: Console, parts: Mapping[str, Any], *, temporaries: int) -> None:
    """Print the memory that a step takes on each device, by part.

    Args:
      console: where to print.
      parts: trees of arrays by name.
      temporaries: bytes that the compiled step allocates besides its arguments.
    """
    sizes = {}
    for name, tree in parts.items():
        sizes[name] = sum(map(_device_bytes, jax.tree.leaves(tree)))
    sizes["activations, gradients and other temporaries"] = temporaries
    sizes["total"] = sum(sizes.values())
    table = _make_table("Memory per device")
    table.add_column("part")
    table.add_column("MB", justify="right")
    for name, size in sizes.items():
        table.add_row(name, f"{size / 1e6:,.1f}")
    console.print(table)


def print_batch(
    console: Console, tokenizer: Any, rows: Sequence[Sequence[Sample]], *, most: int = 2
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
    console: Console, title: str, questions: Sequence[str], columns: Mapping[str, Sequence[str]]
) -> None:
    """Print questions beside their answers."""
    table = _make_table(title, show_lines=True)
    table.add_column("question", ratio=3)
    for name in columns:
        table.add_column(name, ratio=2)
    for i, question in enumerate(questions):
        # Text, because rich would read square brackets in an answer as markup.
        cells = [Text(question)]
        for answers in columns.values():
            cells.append(Text(answers[i]))
        table.add_row(*cells)
    console.print(table)


def print_summary(console: Console, rows: Sequence[tuple[str, str]], *, title: str) -> None:
    """Print names and values in two columns."""
    table = _make_table(title, show_header=False)
    table.add_column("", style="bold")
    table.add_column("", overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _make_table(title: str, *, show_header: bool = True, show_lines: bool = False) -> Table:
    """An empty table in the style of all tables here."""
    return Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        show_header=show_header,
        show_lines=show_lines,
    )


def _option(value: object) -> str:
    """The value of an option as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _device_bytes(leaf: Any) -> int:
    """The bytes of a leaf on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
