"""What a run shows a person: the table of what is adapted, memory by part, the first batch, answers, the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorax_ft.config import Config
from lorax_ft.data.chat import Sample, describe_row
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.linear import ADAPTER_LEAVES
from lorax_ft.quant.kernels import Quantized
from lorax_ft.tree import Tree, flatten, modules

Row = tuple[str, ...]
WIDE = 100  # columns of a terminal that hold all of the table of what trains


def make_console() -> Console:
    """A console that only the first of several processes prints to; output to a file is wide enough for the tables."""
    console = Console(highlight=False, quiet=jax.process_index() != 0)
    return (
        console if console.is_terminal else Console(highlight=False, quiet=console.quiet, width=120)
    )


def print_config(console: Console, config: Config) -> None:
    """The resolved config, a section a paragraph; what differs from the defaults stands out."""
    grid = Table.grid(padding=(0, 2))
    for section in dataclasses.fields(config):
        values, text = getattr(config, section.name), Text()
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            shown = " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
            text.append(f"{field.name} ", style="dim")
            text.append(shown, style="dim" if value == field.default else "bold")
            text.append("   ")
        grid.add_row(Text(section.name, style="cyan"), text)
    console.print(grid)


def adapter_rows(params: Tree, trained: Tree, *, layout: Layout) -> list[Row]:
    """A row for each module that trains: path, matrices, shape, rank, scale, dtype, sharding, parameters."""
    layers, base = modules(trained), modules(params)
    rows: list[Row] = []
    for path, leaves in layers.items():
        layer = base[path]
        dtype = ", ".join(sorted({str(leaf.dtype) for leaf in leaves.values()}))
        if "lora_a" not in layer:
            shapes = ", ".join(_shape(leaf.shape) for leaf in leaves.values())
            count = sum(math.prod(leaf.shape) for leaf in leaves.values())
            rows.append((path, "", shapes, "whole", "", dtype, _spec(leaves), f"{count:,}"))
            continue
        scales, ranks = np.asarray(layer["lora_scale"]).reshape(-1), matrix_ranks(layer)
        active = scales != 0
        _, inner, outer = layout[path].sizes(_kernel_shape(layer, base))
        sides = ("lora_a" in leaves) * inner + ("lora_b" in leaves) * outer
        count = int(ranks.sum()) * sides + ("magnitude" in layer) * int(active.sum()) * outer
        matrices = f"{active.sum()}" + ("" if active.all() else f" of {active.size}")
        rank = _span(ranks[active]) + (" + m" if "magnitude" in layer else "")
        shape = f"{inner} × {outer}"
        rows.append(
            (path, matrices, shape, rank, _span(scales[active]), dtype, _spec(leaves), f"{count:,}")
        )
    return rows


def matrix_ranks(layer: Mapping[str, Any]) -> np.ndarray:
    """The rank of each matrix of a stack: the columns of A, or rows of B, that are not padding."""
    scales, a, b = np.asarray(layer["lora_scale"]), layer["lora_a"], layer["lora_b"]
    n = scales.ndim
    # On the devices: the factors may lie on several hosts.
    columns, rows = (
        jnp.any(a != 0, axis=tuple(range(n, a.ndim - 1))),
        jnp.any(b != 0, axis=tuple(range(n + 1, b.ndim))),
    )
    return (np.asarray(columns | rows).sum(axis=-1) * (scales != 0)).reshape(-1)


def print_table(console: Console, params: Tree, trained: Tree, *, layout: Layout) -> None:
    """What is adapted, and the share of the parameters that trains."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title="What trains",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    names = ("module", "matrices", "shape", "rank", "scale", "dtype", "sharding", "parameters")
    shown = [
        name
        for name in names
        if console.width >= WIDE or name not in ("matrices", "dtype", "sharding")
    ]
    for name in shown:
        left = name in ("module", "dtype", "sharding")
        table.add_column(
            name, justify="left" if left else "right", no_wrap=name != "sharding", overflow="fold"
        )
    rows = adapter_rows(params, trained, layout=layout)
    for row in rows:
        table.add_row(*(cell for name, cell in zip(names, row, strict=True) if name in shown))
    console.print(table)
    count = sum(int(row[-1].replace(",", "")) for row in rows)
    base = base_count(params)
    console.print(f"{count:,} parameters train, {100 * count / base:.3g} % of the base's {base:,}.")
    console.print(f"The base takes {describe_bytes(params)}.\n")


def describe_bytes(params: Tree) -> str:
    """The bytes of the base's arrays, without copies on other devices, and the bits of a quantized parameter."""
    base = {
        path: leaf
        for path, leaf in flatten(params).items()
        if path.rpartition("/")[2] not in ADAPTER_LEAVES
    }
    quantized = [leaf for leaf in base.values() if isinstance(leaf, Quantized)]
    text = f"{_bytes(base) / 1e6:,.1f} MB"
    if not quantized:
        return text
    count, size = sum(math.prod(leaf.shape) for leaf in quantized), _bytes(quantized)
    return f"{text}, of them {size / 1e6:,.1f} MB for {count:,} quantized parameters, {8 * size / count:.3f} bits each"


def base_count(params: Tree) -> int:
    """The number of the base's parameters."""
    return sum(
        math.prod(v.shape)
        for p, v in flatten(params).items()
        if p.rpartition("/")[2] not in ADAPTER_LEAVES
    )


def print_memory(console: Console, parts: Mapping[str, Any], *, temporaries: int) -> None:
    """The memory that a step takes, by part, on each device.

    Args:
      console: where to.
      parts: trees of arrays by name.
      temporaries: bytes that the compiled step asks for beside its arguments.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Memory on each device",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    table.add_column("part")
    table.add_column("MB", justify="right")
    sizes = {name: sum(map(_device_bytes, jax.tree.leaves(tree))) for name, tree in parts.items()}
    sizes["activations, gradients and other temporaries"] = temporaries
    for name, size in (sizes | {"all": sum(sizes.values())}).items():
        table.add_row(name, f"{size / 1e6:,.1f}")
    console.print(table)


def print_batch(
    console: Console, tokenizer: Any, rows: Sequence[Sequence[Sample]], *, most: int = 2
) -> None:
    """The first rows of a batch as the model will see them; what counts in the loss is green."""
    console.print(
        Text.assemble(
            ("The first batch", "bold"), " (what counts in the loss is ", ("⟦marked⟧", "green"), ")"
        )
    )
    for row in rows[:most]:
        text = Text()
        for sample in row:
            for piece, counts in describe_row(tokenizer, sample):
                text.append(f"⟦{piece}⟧" if counts else piece, style="green" if counts else "")
            text.append("\n")
        console.print(text)
    if len(rows) > most:
        console.print(f"… and {len(rows) - most} more rows.\n")


def print_answers(
    console: Console, title: str, questions: Sequence[str], columns: Mapping[str, Sequence[str]]
) -> None:
    """Questions beside their answers."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        show_lines=True,
    )
    table.add_column("question", ratio=3)
    for name in columns:
        table.add_column(name, ratio=2)
    for i, question in enumerate(questions):
        table.add_row(Text(question), *(Text(answers[i]) for answers in columns.values()))
    console.print(table)


def print_summary(console: Console, rows: Sequence[tuple[str, str]], *, title: str) -> None:
    """The run's result as two columns."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        pad_edge=False,
    )
    table.add_column("", style="bold")
    table.add_column("", overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _device_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _kernel_shape(layer: Mapping[str, Any], layers: Mapping[str, Any]) -> tuple[int, ...]:
    for name in ("kernel", "embedding"):
        if name in layer:
            return tuple(layer[name].shape)
    return tuple(layers["embed_tokens"]["embedding"].shape[::-1])


def _spec(leaves: Mapping[str, Any]) -> str:
    """How the leaves of a module lie on the mesh."""
    sharding = next(iter(leaves.values())).sharding
    if sharding.num_devices == 1:
        return "1 device"
    return ", ".join(
        f"{name} {tuple(leaf.sharding.spec)}".replace("None", "–") for name, leaf in leaves.items()
    )


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _span(values: np.ndarray) -> str:
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return low if low == high else f"{low}–{high}"
