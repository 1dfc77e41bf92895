"""Adapters as one tree with a leading axis: adapters of other ranks and modules, padded with zeros.

Zeros are a fixed point of training: where A's columns and B's rows are 0, so are their gradients.
The scale of an adapter is that of its own rank. Letter: K adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_ft import sharding
from lorax_ft.lowrank.terms import kept_start, low_rank
from lorax_ft.schema import PADDED, leaf_name, leaf_schema
from lorax_ft.tree import Tree, flatten, unflatten

FILLED = (*low_rank.TERM.all_leaves, *kept_start.TERM.all_leaves)
"""The leaves that do nothing where they are 0, so that an adapter may lack them."""

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of an adapter's leaves by slash path."""


def shapes_of(tree: Tree) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf."""
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def stack(trees: Sequence[Tree], *, mesh: Mesh) -> Tree:
    """The trees of K adapters as one, each leaf `[K, ...]` on its devices.

    Raises:
      ValueError: an adapter lacks a leaf that zeros cannot stand for.
    """
    flat = [flatten(tree) for tree in trees]
    by_path: dict[str, list[Array]] = {}
    for leaves in flat:
        for path, leaf in leaves.items():
            by_path.setdefault(path, []).append(leaf)
    shapes = {}
    places = {}
    for path, found in by_path.items():
        _check(path, found, count=len(flat))
        shapes[path] = _common_shape(found)
        places[path] = stacked_sharding(found[0], mesh)

    def stacked(flat: list[dict[str, Array]]) -> dict[str, Array]:
        result = {}
        for path, shape in shapes.items():
            dtype = by_path[path][0].dtype
            # Each leaf goes into zeros, which an adapter without the leaf keeps.
            padded = jnp.zeros((len(flat), *shape), dtype)
            for k, leaves in enumerate(flat):
                if path in leaves:
                    corner = _corner(leaves[path].shape)
                    padded = padded.at[(k, *corner)].set(leaves[path])
            result[path] = padded
        return result

    jitted = jax.jit(stacked, out_shardings=places)
    return unflatten(jitted(flat))


def unstack(tree: Tree, k: int, shapes: Shapes) -> Tree:
    """The leaves of adapter number k, without padding: those of `shapes` that the tree has."""
    own = {}
    for path, leaf in flatten(tree).items():
        if path in shapes:
            corner = _corner(shapes[path])
            own[path] = leaf[(k, *corner)]
    return unflatten(own)


def take(tree: Any, members: Sequence[int]) -> Any:
    """The adapters with these numbers, as a copy, each leaf where it was."""
    places = jax.tree.map(lambda leaf: leaf.sharding, tree)
    index = np.array(members)

    def taken(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[index], tree)

    return jax.jit(taken, out_shardings=places)(tree)


def put(tree: Any, members: Sequence[int], part: Any) -> Any:
    """The tree with the adapters of these numbers replaced by those of `part`."""
    places = jax.tree.map(lambda leaf: leaf.sharding, tree)
    index = np.array(members)

    def replaced(tree: Any, part: Any) -> Any:
        return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), tree, part)

    return jax.jit(replaced, out_shardings=places)(tree, part)


def stacked_sharding(leaf: Array, mesh: Mesh) -> NamedSharding:
    """The sharding of `[K, ...]` for adapters with leaves such as this one: K is not split."""
    place = leaf.sharding
    if not isinstance(place, NamedSharding):
        return sharding.replicated(mesh)
    return NamedSharding(mesh, P(None, *place.spec))


def _corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of a padded leaf that is not padding."""
    return tuple(slice(size) for size in shape)


def _common_shape(leaves: Sequence[Array]) -> tuple[int, ...]:
    """The smallest shape that holds all leaves."""
    shapes = [leaf.shape for leaf in leaves]
    sizes = zip(*shapes, strict=True)  # of each axis
    return tuple(map(max, sizes))


def _check(path: str, leaves: Sequence[Array], *, count: int) -> None:
    """Raise unless zeros can make the leaves of all adapters equal in shape."""
    name = leaf_name(path)
    if len(leaves) < count and name not in FILLED:
        raise ValueError(
            f"{count - len(leaves)} of {count} adapters of the sweep have no {path}, and zeros "
            "would change their output; let adapter.targets, exclude and layers be the same"
        )
    shapes = {str(leaf.shape) for leaf in leaves}
    # Ranks may differ; all other sizes are those of the one model.
    if len(shapes) > 1 and not set(PADDED) & set(leaf_schema(name).axes):
        found = " and ".join(sorted(shapes))
        raise ValueError(f"{path} has the shapes {found} in adapters of one sweep")
