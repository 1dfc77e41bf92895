"""Leaves that all adapted layers share, such as VeRA's A and B. They lie at the tree's root.

{"vera_a": A, "vera_b": B, "layers": {"up_proj": {"kernel": W, "vera_lambda_d": d, …}}}

A layer uses the first I rows of A and the first O columns of B. Letters: I inputs, O outputs,
R rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from jax import Array

from lorax_ft.constraints import whole
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.spec import LayerSpec
from lorax_ft.lowrank.terms import TERMS
from lorax_ft.schema import Axis, Place, leaf_schema
from lorax_ft.tree import Layer, Shape


def shared_leaves(root: Mapping[str, object]) -> Layer:
    """The shared leaves of a tree of parameters."""
    return {name: leaf for name, leaf in root.items() if leaf_schema(name).place is Place.ROOT}


def with_shared(layer: Layer, shared: Layer, spec: LayerSpec, kernel: Shape) -> Layer:
    """The layer with its part of those shared leaves beside its own that its terms use.

    Args:
      layer: the layer's leaves.
      shared: those at the tree's root.
      spec: the layer's layout.
      kernel: the shape of its kernel, in its own order of axes.
    """
    sizes: dict[Axis, Shape] = {
        "in": tuple(kernel[axis] for axis in spec.ins),
        "out": tuple(kernel[axis] for axis in spec.outs),
    }
    parts = {}
    for term in TERMS:
        for name in term.shared:
            if name in shared and term.leaves[0] in layer:
                parts[name] = _part(name, shared[name], sizes)
    return layer | parts


def shared_shapes(plans: Collection[Plan]) -> dict[str, Shape]:
    """The shapes of the shared leaves of modules with these plans."""
    names = {name for plan in plans for name in _shared_names(plan)}
    shapes = {}
    for name in sorted(names):
        sizes: dict[Axis, int] = {
            "in": max(plan.rows for plan in plans),
            "out": max(plan.columns for plan in plans),
            "rank": max(plan.width for plan in plans),
        }
        shapes[name] = tuple(sizes[axis] for axis in leaf_schema(name).axes)
    return shapes


def initial_shared(plans: Collection[Plan], key: Array) -> Layer:
    """The values of the shared leaves of modules with these plans."""
    shapes = shared_shapes(plans)
    leaves: Layer = {}
    for term in TERMS:
        own = {name: shapes[name] for name in term.shared if name in shapes}
        if own:
            leaves |= term.initial_shared(own, key)
    return leaves


def _shared_names(plan: Plan) -> list[str]:
    """The shared leaves that a module with this plan uses."""
    return [name for term in TERMS if term.planned(plan) for name in term.shared]


def _part(name: str, leaf: Array, sizes: Mapping[Axis, Shape]) -> Array:
    """The part of a shared leaf that a layer with axes of these sizes uses."""
    first = []
    shape: Shape = ()
    for axis, size in zip(leaf_schema(name).axes, leaf.shape, strict=True):
        own = sizes.get(axis, (size,))
        first.append(slice(math.prod(own)))
        shape += own
    # Without this XLA (jaxlib 0.10.2) may split an axis before it is cut, and get other elements.
    leaf = whole(leaf)
    return leaf[tuple(first)].reshape(shape)
