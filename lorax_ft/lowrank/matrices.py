"""Layers as stacks of matrices: every leaf with one axis for each of stack, in, out and rank.

Letters: L matrices of the stack, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax

from lorax_ft.quant.kernels import Quantized, matrices
from lorax_ft.schema import leaf_schema
from lorax_ft.tree import Layer, Shape


def matrices_of(layer: Layer) -> Layer:
    """The leaves of a canonical layer with one axis each for stack, in, out and rank.

    The kernel becomes `[L, I, O]`, A `[L, I, R]`.

    Raises:
      ValueError: a leaf does not fit the kernel.
    """
    kernel = layer["kernel"]
    n_stack, n_out = _axis_counts(layer)
    first_out = kernel.ndim - n_out
    shapes: dict[str, Shape] = {
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
        shapes["rank"] = (_rank(name, leaf, n_stack),)
        expected: Shape = ()
        flat_shape = []
        for axis in leaf_schema(name).axes:
            expected += shapes[axis]
            flat_shape.append(math.prod(shapes[axis]))
        if expected != leaf.shape:
            raise ValueError(
                f"the leaf {name!r} {leaf.shape} does not fit a kernel {kernel.shape} of axes "
                "stack, in, out; pass layout= (see lorax_ft.layout) for kernels with another order "
                "of axes"
            )
        flat[name] = leaf.reshape(flat_shape)
    return flat


def _rank(name: str, leaf: Array, n_stack: int) -> int:
    """The size of a leaf's rank axis; 0 where it has none."""
    axes = leaf_schema(name).axes
    if "rank" not in axes:
        return 0
    if axes[-1] == "rank":
        return leaf.shape[-1]
    # B's rank comes right behind the stack.
    return leaf.shape[n_stack]


# Jitted, since a loop outside jit would be compiled anew at every call.
@functools.partial(jax.jit, static_argnames=("f", "options"))
def over_stack(f: Callable[..., Any], layers: Layer, options: tuple[Any, ...] = ()) -> Any:
    """f(layer, *options) of each matrix of a stack, one at a time: only one is held in float32."""
    count = layers["kernel"].shape[0]
    if count == 1:
        # No loop is needed for a single matrix.
        layer = jax.tree.map(lambda leaf: leaf[0], layers)
        result = f(layer, *options)
        return jax.tree.map(lambda leaf: leaf[None], result)
    return lax.map(lambda layer: f(layer, *options), layers)


def _axis_counts(layer: Layer) -> tuple[int, int]:
    """How many stack axes and how many out axes the kernel has, from the leaves beside it."""
    others = dict(layer)
    kernel = others.pop("kernel")
    # A leaf with one number per matrix has the stack axes alone.
    n_stack = next(leaf.ndim for name, leaf in others.items() if _is_per_matrix(name))
    for name, leaf in others.items():
        axes = leaf_schema(name).axes
        n_rank = 1 if "rank" in axes else 0
        rest = leaf.ndim - n_stack - n_rank
        if "out" in axes:
            return n_stack, rest
        if "in" in axes:
            return n_stack, kernel.ndim - n_stack - rest
    raise ValueError(f"the axes of a kernel cannot be told from the leaves {', '.join(layer)}")


def _is_per_matrix(name: str) -> bool:
    """Whether a leaf holds one number for each matrix of a stack."""
    return leaf_schema(name).axes == ("stack",)
