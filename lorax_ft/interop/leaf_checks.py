"""Whether the leaves of a file are adapters of a model: their shapes, and values by the schema.

JAX takes the nearest row for an index that is out of bounds, and no shape tells a rank of 7 from
one of 2. So a damaged file, or one of another model, would be read without an error.

Letters: I inputs, O outputs, N elements.
"""

from __future__ import annotations

import collections
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_ft.interop.lazy_tensor import all_finite
from lorax_ft.lowrank.layout import Layout, TracedLayout, blocks_of
from lorax_ft.lowrank.linear import merged_layer
from lorax_ft.lowrank.shared import shared_leaves, with_shared
from lorax_ft.lowrank.spec import EMBEDDING, LayerSpec, base_shape, with_kernel
from lorax_ft.lowrank.terms import TERMS, bottleneck, check_layer, is_adapted, shira, tokens
from lorax_ft.schema import KERNEL_AXES, Axis, Place, is_adapter, is_soft_prompt, leaf_schema
from lorax_ft.tree import Layer, Shape, Tree, join, modules

ANOTHER_MODEL = "was the adapter trained on another model?"
LARGEST_ID = np.iinfo(np.int32).max


def check_leaves(params: Tree, *, layout: Layout, where: Path) -> None:
    """Check the adapters in a tree whose other leaves are the model's own.

    Args:
      params: base and adapters together; the leaves of adapters are NumPy arrays.
      layout: the layers of the model.
      where: the file that the adapters are from.

    Raises:
      ValueError: a leaf has another shape than its layer needs, or holds what its row in
        `lorax_ft.schema.LEAVES` does not allow, or leaves that belong together are missing.
    """
    if not isinstance(layout, Mapping):
        raise ValueError(
            f"layout is a {type(layout).__name__}; give layout=lft.layout(apply, base, *example), "
            "or a loaded model's own"
        )
    layers = modules(params)
    for path, layer in layers.items():
        for name, leaf in layer.items():
            if is_adapter(name):
                _check_place(path, name, layout, where)
                check_numbers(leaf, join(path, name), leaf_schema(name).dtype, where=where)
    for path, layer in layers.items():
        if not is_adapted(layer):
            continue
        check_layer(layer, f"{where}: {path}" if path else str(where))
        if layout[path].module != "block":
            _check_weight(layers, path, layout[path])
        kernel = base_shape(layers, path, layout[path])
        sizes = _own_sizes(layer, layout[path])
        _check_shapes(layer, path, layout[path], kernel, sizes, where)
        _check_values(layer, path, layout[path].sizes(kernel), sizes, where)
    _check_shared(layers, layout, where)
    for path, layer in layers.items():
        if is_adapted(layer) and layout[path].module != "block":
            _check_together(layers, path, layout[path], where)


def check_numbers(leaf: Any, path: str, dtype: Any, *, where: Path) -> None:
    """Raise where a leaf is empty, is not finite, or not of the kind of `dtype`."""
    wanted = jnp.integer if jnp.issubdtype(dtype, jnp.integer) else jnp.floating
    if not jnp.issubdtype(leaf.dtype, wanted):
        raise ValueError(f"{where}: {path} is {leaf.dtype}; it must be {jnp.dtype(dtype)}")
    if not leaf.size:
        raise ValueError(f"{where}: {path} has the shape {leaf.shape}, so it is empty")
    if not all_finite(leaf):
        raise ValueError(f"{where}: {path} has values that are not finite")


def _check_place(path: str, name: str, layout: Layout, where: Path) -> None:
    """Raise where the model takes no such leaf."""
    leaf = join(path, name)
    if is_soft_prompt(leaf):
        raise ValueError(f"{where}: {leaf} is of a soft prompt, which load_peft loads")
    if leaf_schema(name).place is Place.ROOT:
        if path:
            raise ValueError(f"{where}: {leaf} lies beside a layer, but all layers share it")
        return
    places = [*layout]
    if name in bottleneck.TERM.all_leaves:
        places += blocks_of(layout)
    if path not in places:
        reasons = {key.rpartition("/")[0]: why for key, why in _unseen(layout).items()}
        near = difflib.get_close_matches(path, places, n=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        if path in reasons:
            hint = f": {reasons[path]}"
        raise ValueError(
            f"{where}: {leaf}: the model has no layer {path!r} that takes adapters{hint}"
        )


def _check_weight(layers: Mapping[str, Layer], path: str, spec: LayerSpec) -> None:
    """Raise where the tree that the adapters are for has no matrix of the layer."""
    tied = layers.get(spec.tied_to, {}) if spec.tied_to is not None else {}
    if spec.weight not in layers[path] and EMBEDDING not in tied:
        raise ValueError(
            f"the base has no {join(path, spec.weight)}; give the model's parameters, which in "
            "linen are variables['params']"
        )


def _unseen(layout: Layout) -> Mapping[str, str]:
    """Why other matrices take no adapter, where a trace has found it."""
    return layout.unseen if isinstance(layout, TracedLayout) else {}


def _beside_kernel(layer: Layer) -> Layer:
    """The leaves of a layer's adapter."""
    return {
        name: leaf
        for name, leaf in layer.items()
        if is_adapter(name) and leaf_schema(name).place is Place.MODULE
    }


def _own_sizes(layer: Layer, spec: LayerSpec) -> dict[Axis, int]:
    """The sizes of the axes that are not the kernel's, such as the rank: the first leaf's."""
    counts = {"stack": len(spec.stack), "in": len(spec.ins), "out": len(spec.outs)}
    # 1 where no leaf has the right number of axes.
    sizes: dict[Axis, int] = collections.defaultdict(lambda: 1)
    for name, leaf in _beside_kernel(layer).items():
        axes = leaf_schema(name).axes
        if leaf.ndim != sum(counts.get(axis, 1) for axis in axes):
            continue
        shape = spec.canonical(name, leaf).shape
        place = 0
        for axis in axes:
            if axis not in KERNEL_AXES:
                sizes.setdefault(axis, shape[place])
            place += counts.get(axis, 1)
    return sizes


def _check_shapes(
    layer: Layer,
    path: str,
    spec: LayerSpec,
    kernel: Shape,
    sizes: Mapping[Axis, int],
    where: Path,
) -> None:
    """Raise where a leaf does not have the shape that it has beside this kernel."""
    for name, leaf in _beside_kernel(layer).items():
        expected = spec.stored_shape(name, spec.leaf_shape(name, kernel, sizes=sizes))
        if leaf.shape != expected:
            weight = "" if spec.module == "block" else f"{join(path, spec.weight)} "
            raise ValueError(
                f"{where}: {join(path, name)} has the shape {leaf.shape}; beside the model's "
                f"{weight}{kernel} it must be {expected}: {ANOTHER_MODEL}"
            )


def _check_values(
    layer: Layer,
    path: str,
    matrix: tuple[Shape, int, int],
    sizes: Mapping[Axis, int],
    where: Path,
) -> None:
    """Raise where an index, a count or a flag is none."""
    _, rows, columns = matrix
    # An embedding has a row for each token, a head has a column.
    vocabulary = rows if tokens.ROWS in layer else columns
    ends = {"in": rows, "out": columns, "vocabulary": vocabulary}
    for name, leaf in _beside_kernel(layer).items():
        row = leaf_schema(name)
        place = f"{where}: {join(path, name)}"
        if row.indexes is not None:
            _check_range(leaf, ends[row.indexes] - 1, place)
        elif row.is_flag:
            _check_range(leaf, 1, place)
        elif row.counts is not None:
            # SHiRA has I + O elements for each unit of its rank.
            unit = rows + columns if row.counts == "entry" else 1
            _check_range(leaf, sizes[row.counts] // unit, place)
    if tokens.IDS in layer and np.any(np.diff(layer[tokens.IDS]) <= 0):
        raise ValueError(
            f"{where}: {join(path, tokens.IDS)} must be in ascending order, each token once"
        )
    if shira.RANK in layer:
        _check_distinct(layer, path, rows, columns, where)


def _check_range(leaf: np.ndarray, most: int, place: str) -> None:
    """Raise where values are not whole numbers from 0 to `most`."""
    wrong = (leaf < 0) | (leaf > most) | (leaf != np.round(leaf))
    if np.any(wrong):
        value = float(leaf[wrong].reshape(-1)[0])
        raise ValueError(f"{place} has the value {value:g}; it must be a whole number, 0 to {most}")


def _check_distinct(layer: Layer, path: str, rows: int, columns: int, where: Path) -> None:
    """Raise where two elements of SHiRA's sparse matrix are at one place."""
    places = layer[shira.ROW].astype(np.int64) * columns + layer[shira.COLUMN]
    counts = (layer[shira.RANK] * (rows + columns)).astype(int)
    flat = places.reshape(-1, places.shape[-1])  # [L, N]
    for own, count in zip(flat, counts.reshape(-1), strict=True):
        # What follows is padding.
        if len(np.unique(own[:count])) < count:
            raise ValueError(
                f"{where}: {join(path, shira.ROW)} and {shira.COLUMN} name a place twice"
            )


def _check_shared(layers: Mapping[str, Layer], layout: Layout, where: Path) -> None:
    """Raise where a leaf that all layers share is missing, or does not fit them."""
    for path, layer in layers.items():
        for term in TERMS:
            missing = [name for name in term.shared if name not in layers.get("", {})]
            if term.leaves[0] in layer and missing:
                raise ValueError(
                    f"{where}: {join(path, term.leaves[0])} is there, but no {missing[0]!r}, which "
                    "all layers share"
                )
    for name, leaf in shared_leaves(layers.get("", {})).items():
        row = leaf_schema(name)
        if leaf.ndim != len(row.axes):
            raise ValueError(
                f"{where}: {name} has the shape {leaf.shape}, but its axes are "
                f"{', '.join(row.axes)}"
            )
        sides = _largest_sides(name, layers, layout)
        for axis, size in zip(row.axes, leaf.shape, strict=True):
            if size != sides.get(axis, size):
                raise ValueError(
                    f"{where}: {name} has the shape {leaf.shape}; the largest of the model's "
                    f"layers that use it needs {sides[axis]} along {axis!r}: {ANOTHER_MODEL}"
                )
        if row.indexes is not None:
            _check_range(leaf, _largest_token(layers, layout), f"{where}: {name}")


def _largest_sides(name: str, layers: Mapping[str, Layer], layout: Layout) -> dict[Axis, int]:
    """I and O of the largest layers that use a shared leaf; nothing if none does."""
    users = [term.leaves[0] for term in TERMS if name in term.shared]
    sides: dict[Axis, int] = {}
    for path, layer in layers.items():
        if any(user in layer for user in users):
            _, rows, columns = layout[path].sizes(base_shape(layers, path, layout[path]))
            sides["in"] = max(sides.get("in", 0), rows)
            sides["out"] = max(sides.get("out", 0), columns)
    return sides


def _largest_token(layers: Mapping[str, Layer], layout: Layout) -> int:
    """The last token of the largest embedding; any number if the layout has no embedding."""
    largest = []
    for path, spec in layout.items():
        if spec.module == "embed":
            _, rows, _ = spec.sizes(base_shape(layers, path, spec))
            largest.append(rows - 1)
    return max(largest, default=LARGEST_ID)


def _check_together(layers: Mapping[str, Layer], path: str, spec: LayerSpec, where: Path) -> None:
    """Raise where leaves do not fit one another, such as the blocks of OFT the kernel's rows."""
    # No kernel can take a bottleneck; its axes are the kernel's and the rank.
    unmerged = {name for term in TERMS if term.merge is None for name in term.all_leaves}
    kernel = base_shape(layers, path, spec)

    def merged(layers: Mapping[str, Layer]) -> Layer:
        layer = with_kernel(layers, path, spec)
        layer = {name: leaf for name, leaf in layer.items() if name not in unmerged}
        shared = shared_leaves(layers.get("", {}))
        return merged_layer(with_shared(layer, shared, spec, kernel), n_out=len(spec.outs))

    needed = [path, ""] + ([spec.tied_to] if spec.tied_to else [])
    used = {key: layers[key] for key in needed if key in layers}
    try:
        jax.eval_shape(merged, used)
    except Exception as error:  # whatever operations on such shapes raise
        shapes = [f"{name} {leaf.shape}" for name, leaf in _beside_kernel(layers[path]).items()]
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{where}: {path}: {', '.join(shapes)} do not fit the model's {spec.weight} {kernel} "
            f"({reason}): {ANOTHER_MODEL}"
        ) from error
