"""The leaves of a model's layers that the tensors of a PEFT folder become."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft.interop.peft_methods import Matrix
from lorax_ft.interop.peft_names import Place
from lorax_ft.interop.peft_tensors import Entry
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.shared import shared_leaves
from lorax_ft.lowrank.spec import LayerSpec, base_kernel, base_shape, with_kernel
from lorax_ft.lowrank.terms import magnitude
from lorax_ft.models.model import HEAD, TABLE
from lorax_ft.quant.kernels import Quantized
from lorax_ft.schema import KERNEL_AXES, PADDED, Axis, leaf_schema
from lorax_ft.tree import Layer


def with_own_weight(
    layers: Mapping[str, Layer],
    place: Place,
    entry: Entry,
    layout: Layout,
    *,
    where: Path,
) -> dict[str, Layer]:
    """The layers that a weight, or a bias, of one layer of a stack replaces."""
    path, index = place
    layer = layers.get(path)
    if layer is None:  # a tied head, which the folder unties
        layer = {"kernel": base_kernel(layers, path, layout[path])}
    name = _own_leaf(layer, entry, where=where)
    old = layer[name]
    value = entry.value
    expected = old[index].shape
    if name == "kernel":
        expected = expected[::-1]  # torch's Linear has [out, in]
    # A table may have grown further than PEFT's, which ends with the last token.
    ends_before = path in (TABLE, HEAD) and value.shape[0] < expected[0]
    if expected != value.shape and not (ends_before and value.shape[1:] == expected[1:]):
        raise ValueError(
            f"{where}: {entry.key} has the shape {value.shape}; the model's is {expected}"
        )
    if name == "kernel":
        value = value.T
    dtype = jnp.promote_types(old.dtype, value.dtype)
    own = index + tuple(slice(size) for size in value.shape)
    replaced = jnp.asarray(old, dtype).at[own].set(jnp.asarray(value, dtype))
    new = {path: layer | {name: replaced}}
    if entry.leaf == "whole" and path == TABLE and HEAD not in layers:
        # PEFT trains a copy of the table, so a tied head keeps the original.
        new[HEAD] = {"kernel": base_kernel(layers, HEAD, layout[HEAD])}
    return new


def _own_leaf(layer: Layer, entry: Entry, *, where: Path) -> str:
    """The name of the layer's leaf that the tensor replaces."""
    if entry.leaf == "bias":
        name = "bias"
    else:
        name = next(name for name in ("kernel", "embedding", "scale") if name in layer)
    if name not in layer:
        raise ValueError(f"{where}: {entry.key}: the model's module has no bias")
    if isinstance(layer[name], Quantized):
        raise ValueError(
            f"{where}: {entry.key} was trained in full, but the model is quantized: load it with "
            "quant.format none"
        )
    return name


def stacked_leaves(
    matrices: Mapping[tuple[int, ...], Matrix],
    layers: Mapping[str, Layer],
    path: str,
    spec: LayerSpec,
    *,
    where: Path,
) -> Layer:
    """The adapter leaves of a stack: zeros beyond a matrix's rank, and for matrices without one."""
    kernel_shape = base_shape(layers, path, spec)
    sizes = _own_sizes(matrices.values())
    names = {frozenset(matrix) for matrix in matrices.values()}
    if len(names) > 1:
        raise ValueError(
            f"{where}: the layers of {path} are adapted in different ways; here they are one "
            "stack, whose layers must be adapted alike"
        )
    leaves = {}
    for name in next(iter(matrices.values())):
        shape = spec.leaf_shape(name, kernel_shape, sizes=sizes)
        leaves[name] = np.zeros(shape, leaf_schema(name).dtype)
    for index, matrix in matrices.items():
        for name, value in matrix.items():
            leaf = leaves[name]
            _check_fits(name, value, leaf[index].shape, path, where=where)
            # Only an axis such as the rank may be longer than the matrix's own.
            own: tuple[Any, ...] = tuple(slice(size) for size in value.shape)
            leaf[index + own] = value
    layer = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    stack, _, _ = spec.sizes(kernel_shape)
    if magnitude.MAGNITUDE in layer and len(matrices) < math.prod(stack):
        # Where there is no adapter, the magnitude is the identity.
        adapted = layers.get(path, {}) | layer
        whole = with_kernel({**layers, path: adapted}, path, spec)
        full = np.array(magnitude.column_norm(whole))
        for index, matrix in matrices.items():
            full[index] = matrix[magnitude.MAGNITUDE]
        layer[magnitude.MAGNITUDE] = jnp.asarray(full)
    return layer


def check_shared(
    layers: Mapping[str, Layer],
    adapted: Iterable[str],
    layout: Layout,
    *,
    where: Path,
) -> None:
    """Raise where an adapted module has more inputs or outputs than the leaves that all share."""
    for name, leaf in shared_leaves(layers[""]).items():
        for path in adapted:
            spec = layout[path]
            _, inputs, outputs = spec.sizes(base_shape(layers, path, spec))
            needed = {"in": inputs, "out": outputs}
            for axis, size in zip(leaf_schema(name).axes, leaf.shape, strict=True):
                if size < needed.get(axis, 0):
                    raise ValueError(
                        f"{where}: {name} has the shape {leaf.shape}, and {path} needs "
                        f"{needed[axis]} {axis}puts"
                    )


def _own_sizes(matrices: Iterable[Matrix]) -> dict[Axis, int]:
    """The largest sizes of those axes that are not the kernel's, such as the rank."""
    sizes: dict[Axis, int] = {}
    for matrix in matrices:
        for name, value in matrix.items():
            _, *axes = leaf_schema(name).axes  # without the stack axis
            for axis, size in zip(axes, value.shape, strict=True):
                if axis not in KERNEL_AXES:
                    sizes[axis] = max(size, sizes.get(axis, 0))
    return sizes


def _check_fits(
    name: str,
    value: np.ndarray,
    expected: tuple[int, ...],
    path: str,
    *,
    where: Path,
) -> None:
    """Raise where a leaf has another size than the model's module, apart from the rank's."""
    axes = leaf_schema(name).axes[1:]
    rank_as_given = [
        size if axis in PADDED else wanted
        for axis, size, wanted in zip(axes, value.shape, expected, strict=True)
    ]
    needed = tuple(rank_as_given)
    if value.shape == needed:
        return
    given = value.shape
    if name in ("lora_a", "lora_b"):  # in the file they stand the other way round
        given, needed = given[::-1], needed[::-1]
    raise ValueError(f"{where}: {name} of {path} has the shape {given}; the model needs {needed}")
