"""Tables that a run prints: config, trainable modules, memory, first batch, answers, result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorax_ft.config import Config
from lorax_ft.data.chat import Sample, describe_row
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.spec import base_shape
from lorax_ft.lowrank.terms import TERMS, active_leaf, is_adapted, low_rank, magnitude
from lorax_ft.quant.kernels import Quantized
from lorax_ft.schema import is_base, leaf_schema
from lorax_ft.tree import Tree, flatten, modules

FILE_WIDTH = 120
"""Columns of output that goes to a file."""
WIDE = 100
"""Columns that the whole table of modules needs; a narrower terminal gets fewer columns."""
WIDE_ONLY = ("matrices", "dtype", "sharding")
"""Columns of the table of modules that a narrow terminal leaves out."""


class ModuleRow(NamedTuple):
    """A line of the table of trainable modules. The field names are the table's header."""

    module: str
    matrices: str
    """Matrices of the stack that are adapted."""
    shape: str
    rank: str
    scale: str
    dtype: str
    sharding: str
    parameters: int


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


def module_rows(params: Tree, trained: Tree, *, layout: Layout) -> list[ModuleRow]:
    """A row for each module with trained leaves."""
    layers = modules(params)
    rows = []
    for path, leaves in modules(trained).items():
        layer = layers[path]
        if is_adapted(layer):
            _, inputs, outputs = layout[path].sizes(base_shape(layers, path, layout[path]))
            rows.append(_adapter_row(path, layer, leaves, inputs=inputs, outputs=outputs))
        else:
            rows.append(_full_row(path, leaves))
    return rows


def _adapter_row(
    path: str, layer: Mapping[str, Any], trained: Mapping[str, Any], *, inputs: int, outputs: int
) -> ModuleRow:
    """The row of a module with an adapter."""
    # In a stack of layers, this leaf is 0 for those that are not adapted.
    switch = np.asarray(layer[active_leaf(dict(layer))]).reshape(-1)
    adapted = switch != 0
    matrices = f"{adapted.sum()}"
    if not adapted.all():
        matrices += f" of {adapted.size}"
    ranks = matrix_ranks(layer)
    parameters = 0
    for name in trained:
        # Padding of the ranks, and matrices that are not adapted, are not counted.
        sizes = {"in": inputs, "out": outputs, "rank": ranks[adapted]}
        axes = leaf_schema(name).axes[1:]
        per_matrix = np.prod([np.broadcast_to(sizes[axis], adapted.sum()) for axis in axes], axis=0)
        parameters += int(per_matrix.sum())
    rank = _span(ranks[adapted]) if ranks.any() else "–"
    if magnitude.MAGNITUDE in layer:
        rank += " + m"
    return ModuleRow(
        module=path,
        matrices=matrices,
        shape=f"{inputs} × {outputs}",
        rank=rank,
        scale=_span(switch[adapted]) if low_rank.SCALE in layer else "–",
        dtype=_dtypes(trained),
        sharding=_sharding(trained),
        parameters=parameters,
    )


def _full_row(path: str, trained: Mapping[str, Any]) -> ModuleRow:
    """The row of a module whose own weights train."""
    return ModuleRow(
        module=path,
        matrices="",
        shape=", ".join(" × ".join(map(str, leaf.shape)) for leaf in trained.values()),
        rank="full",
        scale="",
        dtype=_dtypes(trained),
        sharding=_sharding(trained),
        parameters=_parameters(trained),
    )


def matrix_ranks(layer: Mapping[str, Any]) -> np.ndarray:
    """The rank of each matrix of an adapted stack, `[L]`; 0 where the method has no ranks."""
    for term in TERMS:
        if term.ranks is not None and term.leaves[0] in layer:
            return term.ranks(dict(layer))
    return np.zeros(layer[active_leaf(dict(layer))].size, int)


def describe_bytes(params: Tree) -> str:
    """The size of the base, counted once however often it is replicated.

    For a quantized base also the bits per quantized parameter.
    """
    base = _base_leaves(params)
    text = f"{_bytes(base) / 1e6:,.1f} MB"
    quantized = {path: leaf for path, leaf in base.items() if isinstance(leaf, Quantized)}
    if not quantized:
        return text
    count = _parameters(quantized)
    size = _bytes(quantized)
    return (
        f"{text}, of which {size / 1e6:,.1f} MB hold {count:,} quantized parameters, "
        f"{8 * size / count:.3f} bits each"
    )


def base_count(params: Tree) -> int:
    """The number of parameters of the base."""
    return _parameters(_base_leaves(params))


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


def _base_leaves(params: Tree) -> dict[str, Any]:
    """The leaves that are not part of an adapter, by slash path."""
    leaves = flatten(params)
    return {path: leaf for path, leaf in leaves.items() if is_base(path)}


def _parameters(leaves: Mapping[str, Any]) -> int:
    """The number of parameters; a quantized leaf has the shape of its kernel."""
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _device_bytes(leaf: Any) -> int:
    """The bytes of a leaf on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _dtypes(leaves: Mapping[str, Any]) -> str:
    return ", ".join(sorted({str(leaf.dtype) for leaf in leaves.values()}))


def _sharding(leaves: Mapping[str, Any]) -> str:
    """How the leaves of a module are sharded."""
    first = next(iter(leaves.values()))
    if first.sharding.num_devices == 1:
        return "1 device"
    specs = [f"{name} {tuple(leaf.sharding.spec)}" for name, leaf in leaves.items()]
    return ", ".join(specs).replace("None", "–")


def _span(values: np.ndarray) -> str:
    """The smallest and the largest value, or the value that all share."""
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    if low == high:
        return low
    return f"{low}–{high}"
