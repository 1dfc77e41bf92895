"""The names of a mesh's axes, and which of them split an array's axis.

The ambient mesh is that of `jax.set_mesh`: the model's functions find it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""The axes of a mesh. Neighbors along the last ones exchange most."""
ROW_AXES = ("data", "fsdp", "expert")
"""The mesh axes that the rows of a batch are split over."""
TOKEN_AXIS = "context"
"""The mesh axis that the tokens of a row are split over."""
SHARDS = ("fsdp", "context")
"""The mesh axes that weights are split over, beside `tensor`."""

MeshAxis = str | tuple[str, ...] | None
"""The mesh axes that an array's axis is split over; None: it is whole on every device."""


def axis_names(axis: MeshAxis) -> tuple[str, ...]:
    """The mesh axes as a tuple."""
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def devices_along(axis: MeshAxis, sizes: Mapping[str, int]) -> int:
    """How many parts an array's axis is split into, by the size of each mesh axis."""
    return math.prod(sizes.get(name, 1) for name in axis_names(axis))


def ambient_sizes() -> Mapping[str, int]:
    """The sizes of the ambient mesh's axes; empty without a mesh."""
    return jax.sharding.get_abstract_mesh().shape


def row_devices(mesh: Mesh | None = None) -> int:
    """How many devices of a mesh a batch's rows are split over; of the ambient one, or 1."""
    sizes = ambient_sizes() if mesh is None else mesh.shape
    return devices_along(ROW_AXES, sizes)


def expert_devices() -> int:
    """How many devices of the ambient mesh the experts are split over; 1 without a mesh."""
    return devices_along("expert", ambient_sizes())


def token_devices() -> int:
    """How many devices of the ambient mesh a row's tokens are split over; 1 without a mesh."""
    return devices_along(TOKEN_AXIS, ambient_sizes())


def dividing(axis: MeshAxis, size: int) -> MeshAxis:
    """Axes of the ambient mesh, if they split so many into equal parts; else None."""
    sizes = ambient_sizes()
    present = tuple(name for name in axis_names(axis) if name in sizes)
    if not present or size % devices_along(present, sizes):
        return None
    return present


def in_auto_axes(
    function: Callable[..., Any],
    *args: Any,
    like: Callable[..., Any],
) -> Any:
    """`function(*args)`, on a mesh of Explicit axes as on one of Auto axes.

    JAX then decides how arrays inside are split, and the result is split as that of `like(*args)`,
    which is not computed. Without Explicit axes it is a plain call.
    """
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(args)]
    if not any(AxisType.Explicit in sharding.mesh.axis_types for sharding in shardings):
        return function(*args)
    out_sharding = jax.tree.map(lambda y: y.sharding, jax.eval_shape(like, *args))
    return jax.sharding.auto_axes(function, out_sharding=out_sharding)(*args)


def all_axes_are_auto() -> bool:
    """Whether the ambient mesh has axes, and all of them are Auto: no array may name its own."""
    types = jax.sharding.get_abstract_mesh().axis_types
    return bool(types) and AxisType.Explicit not in types


def has_explicit_axes(tree: Any) -> bool:
    """Whether arrays of a tree lie on a mesh of Explicit axes; not of those that are traced."""
    return any(map(_is_explicit, jax.tree.leaves(tree)))


def with_auto_axes(function: Callable[[Any], Any], tree: Any, *, keep: Any = None) -> Any:
    """`function(tree)`, also where a reshape leaves it to JAX how the result is split.

    Arrays on a mesh of Explicit axes lie on the same devices with Auto axes meanwhile; the axes of
    the result are Explicit again. A leaf of the result with the path and shape of one in `keep` is
    split as that.
    """
    leaves = filter(_is_explicit, jax.tree.leaves(tree))
    mesh = next((leaf.sharding.mesh for leaf in leaves), None)
    if mesh is None:
        return function(tree)
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def there(leaf: Any) -> Any:
        is_split = _is_explicit(leaf)
        return jax.device_put(leaf, NamedSharding(auto, leaf.sharding.spec)) if is_split else leaf

    kept = dict(jax.tree.leaves_with_path(keep))

    def back(path: Any, leaf: Any) -> Any:
        before = kept.get(path)
        if before is not None and _is_explicit(before) and before.shape == leaf.shape:
            return jax.device_put(leaf, before.sharding)
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh != auto:
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, sharding.spec))

    with jax.set_mesh(auto):
        result = function(jax.tree.map(there, tree))
    return jax.tree.map_with_path(back, result)


def _is_explicit(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
