"""The trainable modules of a run as rows of a table, and the size of the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.spec import base_shape
from lorax_ft.lowrank.terms import TERMS, active_leaf, is_adapted, low_rank, magnitude, tokens
from lorax_ft.quant.kernels import Quantized
from lorax_ft.schema import is_base, is_soft_prompt, leaf_schema
from lorax_ft.tree import Layer, Tree, flatten, modules


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


def module_rows(params: Tree, trained: Tree, *, layout: Layout) -> list[ModuleRow]:
    """A row for each module with trained leaves."""
    layers = modules(params)
    rows = []
    for path, leaves in modules(trained).items():
        layer = layers[path]
        if any(map(is_soft_prompt, leaves)):
            rows.append(_prompt_row(path, leaves))
        elif is_adapted(layer):
            spec = layout[path]
            shape = base_shape(layers, path, spec)
            _, inputs, outputs = spec.sizes(shape)
            rows.append(_adapter_row(path, layer, leaves, inputs=inputs, outputs=outputs))
        else:
            rows.append(_full_row(path, leaves))
    return rows


def matrix_ranks(layer: Layer) -> np.ndarray:
    """The rank of each matrix of an adapted stack, `[L]`; 0 where the method has no ranks."""
    for term in TERMS:
        if term.ranks is not None and term.leaves[0] in layer:
            return term.ranks(layer)
    return np.zeros(layer[active_leaf(layer)].size, int)


def base_count(params: Tree) -> int:
    """The number of parameters of the base."""
    return _parameters(_base_leaves(params))


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


def _adapter_row(
    path: str,
    layer: Layer,
    trained: Layer,
    *,
    inputs: int,
    outputs: int,
) -> ModuleRow:
    """The row of a module with an adapter."""
    # In a stack of layers, this leaf is 0 for those that are not adapted.
    active = np.asarray(layer[active_leaf(layer)]).reshape(-1)
    adapted = active != 0
    count = int(adapted.sum())
    matrices = f"{count}" if adapted.all() else f"{count} of {adapted.size}"
    if tokens.IDS in layer:
        matrices = f"{layer[tokens.IDS].size} tokens"
    ranks = matrix_ranks(layer)[adapted]
    # Padding of the ranks, and factors frozen by adapter.freeze, are not counted.
    sides = {"in": inputs, "out": outputs}
    parameters = 0
    for name, leaf in trained.items():
        _, *axes = leaf_schema(name).axes  # of one matrix
        elements = int(ranks.sum()) if "rank" in axes else count
        for axis, size in zip(axes, leaf.shape[-len(axes) :], strict=True):
            if axis != "rank":
                elements *= sides.get(axis, size)
        parameters += elements
    rank = _span(ranks) if ranks.any() else "–"
    if magnitude.MAGNITUDE in layer:
        rank += " + m"
    return ModuleRow(
        module=path,
        matrices=matrices,
        shape=f"{inputs} × {outputs}",
        rank=rank,
        scale=_span(active[adapted]) if low_rank.SCALE in layer else "–",
        dtype=_dtypes(trained),
        sharding=_sharding(trained),
        parameters=parameters,
    )


def _prompt_row(path: str, trained: Mapping[str, Any]) -> ModuleRow:
    """The row of a soft prompt, or of its encoder."""
    row = _full_row(path, trained)
    return row._replace(rank="–", scale="–", matrices="–")


def _full_row(path: str, trained: Mapping[str, Any]) -> ModuleRow:
    """The row of a module whose own weights train."""
    shapes = []
    for leaf in trained.values():
        shapes.append(" × ".join(map(str, leaf.shape)))
    return ModuleRow(
        module=path,
        matrices="",
        shape=", ".join(shapes),
        rank="full",
        scale="",
        dtype=_dtypes(trained),
        sharding=_sharding(trained),
        parameters=_parameters(trained),
    )


def _base_leaves(params: Tree) -> dict[str, Any]:
    """The leaves that are not part of an adapter, by slash path."""
    leaves = flatten(params)
    return {path: leaf for path, leaf in leaves.items() if is_base(path)}


def _parameters(leaves: Mapping[str, Any]) -> int:
    """The number of parameters; a quantized leaf has the shape of its kernel."""
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _dtypes(leaves: Mapping[str, Any]) -> str:
    """The dtypes of some leaves, each once."""
    names = {str(leaf.dtype) for leaf in leaves.values()}
    return ", ".join(sorted(names))


def _sharding(leaves: Mapping[str, Any]) -> str:
    """How the leaves of a module are sharded."""
    first = next(iter(leaves.values()))
    if first.sharding.num_devices == 1:
        return "1 device"
    specs = [f"{name} {tuple(leaf.sharding.spec)}" for name, leaf in leaves.items()]
    return ", ".join(specs).replace("None", "–")


def _span(values: np.ndarray) -> str:
    """The smallest and the largest value, or the value that all share."""
    # As they are shown: values that differ in later digits are one.
    low = f"{values.min():.4g}"
    high = f"{values.max():.4g}"
    if low == high:
        return low
    return f"{low}–{high}"
