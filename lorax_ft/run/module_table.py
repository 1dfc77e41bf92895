"""The trainable modules of a run as rows of a table, and the size of the base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.linear import ADAPTER_LEAVES
from lorax_ft.quant.kernels import Quantized
from lorax_ft.tree import Tree, flatten, modules


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
        if "lora_a" in layer:
            _, inputs, outputs = layout[path].sizes(_kernel_shape(layer, layers))
            rows.append(_adapter_row(path, layer, leaves, inputs=inputs, outputs=outputs))
        else:
            rows.append(_full_row(path, leaves))
    return rows


def matrix_ranks(layer: Mapping[str, Any]) -> np.ndarray:
    """The rank of each matrix of a stack: the columns of A, or rows of B, that are not padding."""
    scales = np.asarray(layer["lora_scale"])
    a, b = layer["lora_a"], layer["lora_b"]  # [*L, *in, R] and [*L, R, *out]
    n = scales.ndim
    # Reduced on the devices, because the factors may be sharded over several hosts.
    columns = jnp.any(a != 0, axis=tuple(range(n, a.ndim - 1)))  # [*L, R]
    rows = jnp.any(b != 0, axis=tuple(range(n + 1, b.ndim)))  # [*L, R]
    # Either factor may start at 0; padding is 0 in both.
    ranks = np.asarray(columns | rows).sum(axis=-1)
    return (ranks * (scales != 0)).reshape(-1)


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
    path: str, layer: Mapping[str, Any], trained: Mapping[str, Any], *, inputs: int, outputs: int
) -> ModuleRow:
    """The row of a module with an adapter."""
    scales = np.asarray(layer["lora_scale"]).reshape(-1)
    ranks = matrix_ranks(layer)
    # In a stack of layers, those that are not adapted have the scale 0.
    adapted = scales != 0
    matrices = f"{adapted.sum()}"
    if not adapted.all():
        matrices += f" of {adapted.size}"
    # Padding of the ranks and factors frozen by adapter.freeze are not counted.
    parameters_per_rank = 0
    if "lora_a" in trained:
        parameters_per_rank += inputs
    if "lora_b" in trained:
        parameters_per_rank += outputs
    parameters = int(ranks.sum()) * parameters_per_rank
    rank = _span(ranks[adapted])
    if "magnitude" in layer:
        parameters += int(adapted.sum()) * outputs
        rank += " + m"
    return ModuleRow(
        module=path,
        matrices=matrices,
        shape=f"{inputs} × {outputs}",
        rank=rank,
        scale=_span(scales[adapted]),
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


def _kernel_shape(layer: Mapping[str, Any], layers: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a module's kernel or embedding."""
    for name in ("kernel", "embedding"):
        if name in layer:
            return tuple(layer[name].shape)
    # A tied head has no kernel of its own: it is the transposed embedding.
    return tuple(layers["embed_tokens"]["embedding"].shape[::-1])


def _base_leaves(params: Tree) -> dict[str, Any]:
    """The leaves that are not part of an adapter, by slash path."""
    leaves = flatten(params)
    return {p: leaf for p, leaf in leaves.items() if p.rpartition("/")[2] not in ADAPTER_LEAVES}


def _parameters(leaves: Mapping[str, Any]) -> int:
    """The number of parameters; a quantized leaf has the shape of its kernel."""
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


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
