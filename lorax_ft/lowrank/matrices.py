"""Layers as stacks of matrices: every leaf with one axis for each of stack, in, out and rank.

Letters: L matrices of the stack, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lorax_ft.quant.kernels import Quantized, matrices
from lorax_ft.schema import KERNEL_AXES, Axis, Place, leaf_schema
from lorax_ft.tree import Layer, Shape


def matrices_of(layer: Layer, *, n_out: int | None = None) -> Layer:
    """The leaves of a canonical layer with one axis each for stack, in, out and rank.

    The kernel becomes `[L, I, O]`, A `[L, I, R]`. `n_out` is how many axes of the kernel are of the
    output; None: as the other leaves say, or one.

    Raises:
      ValueError: a leaf does not fit the kernel.
    """
    kernel = layer["kernel"]
    n_stack, said_n_out = _axis_counts(layer)
    n_out = said_n_out if n_out is None else n_out
    first_out = kernel.ndim - n_out
    shapes: dict[Axis, Shape] = {
        "stack": kernel.shape[:n_stack],
        "in": kernel.shape[n_stack:first_out],
        "out": kernel.shape[first_out:],
    }
    flat = {}
    for name, leaf in layer.items():
        if isinstance(leaf, Quantized):
            stack = math.prod(shapes["stack"])
            rows = math.prod(shapes["in"])
            flat[name] = matrices(leaf, stack=stack, rows=rows)
            continue
        expected: Shape = ()
        flat_shape = []
        for axis in leaf_schema(name).axes:
            own_size = leaf.shape[len(expected) : len(expected) + 1]
            sizes = shapes.get(axis, own_size)
            expected += sizes
            flat_shape.append(math.prod(sizes))
        if expected != leaf.shape:
            raise ValueError(
                f"the leaf {name!r} {leaf.shape} does not fit a kernel {kernel.shape} of axes "
                "stack, in, out; pass layout= (see lorax_ft.layout) for kernels with another order "
                "of axes"
            )
        flat[name] = leaf.reshape(flat_shape)
    return flat


# Jitted, since a loop outside jit would be compiled anew at every call.
@functools.partial(jax.jit, static_argnames=("f", "options"))
def over_stack(f: Callable[..., Any], layers: Layer, options: tuple[Any, ...] = ()) -> Any:
    """f(layer, *options) of each matrix of a stack, one at a time: only one is held in float32.

    Leaves that all layers share are given to each.
    """
    shared = {name: leaf for name, leaf in layers.items() if leaf_schema(name).place is Place.ROOT}
    layers = {name: leaf for name, leaf in layers.items() if name not in shared}
    count = layers["kernel"].shape[0]
    if count == 1:
        # No loop is needed for a single matrix.
        layer = jax.tree.map(lambda leaf: leaf[0], layers)
        result = f(layer | shared, *options)
        return jax.tree.map(lambda leaf: leaf[None], result)
    return lax.map(lambda layer: f(layer | shared, *options), layers)


def _axis_counts(layer: Layer) -> tuple[int, int]:
    """How many stack axes and how many out axes the kernel has, from the leaves beside it."""
    others = dict(layer)
    kernel = others.pop("kernel")
    # A leaf with one number per matrix has the stack axes alone.
    n_stack = next(leaf.ndim for name, leaf in others.items() if _is_per_matrix(name))
    for name, leaf in others.items():
        axes = leaf_schema(name).axes
        if axes[:1] != ("stack",):
            continue
        n_own = sum(axis not in KERNEL_AXES for axis in axes)
        rest = leaf.ndim - n_stack - n_own
        if "out" in axes:
            return n_stack, rest
        if "in" in axes:
            return n_stack, kernel.ndim - n_stack - rest
    return n_stack, 1


def _is_per_matrix(name: str) -> bool:
    """Whether a leaf holds one number for each matrix of a stack."""
    return leaf_schema(name).axes == ("stack",)
