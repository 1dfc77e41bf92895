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

Layer = dict[str, Any]


def matrices_of(layer: Layer) -> Layer:
    """The leaves of a layer in canonical order, such as the kernel as `[L, I, O]` and A as `[L, I, R]`.

    Raises:
      ValueError: a leaf does not fit the kernel.
    """
    kernel = layer["kernel"]
    n_stack, n_out = _axis_counts(layer)
    n_in = kernel.ndim - n_stack - n_out
    parts: dict[str, tuple[int, ...]] = {
        "stack": kernel.shape[:n_stack],
        "in": kernel.shape[n_stack : n_stack + n_in],
        "out": kernel.shape[n_stack + n_in :],
    }
    sizes = {axis: math.prod(part) for axis, part in parts.items()}
    flat = {}
    for name, leaf in layer.items():
        if isinstance(leaf, Quantized):
            flat[name] = matrices(leaf, stack=sizes["stack"], rows=sizes["in"])
            continue
        axes = leaf_schema(name).axes
        rank = (_rank(name, leaf, n_stack),)
        expected = [size for axis in axes for size in (parts | {"rank": rank})[axis]]
        if tuple(expected) != leaf.shape:
            raise ValueError(
                f"the leaf {name!r} {leaf.shape} does not fit a kernel {kernel.shape} of axes stack, "
                "in, out; pass layout= (see lorax_ft.layout) for kernels with another order of axes"
            )
        flat[name] = leaf.reshape([(sizes | {"rank": rank[0]})[axis] for axis in axes])
    return flat


def _rank(name: str, leaf: Array, n_stack: int) -> int:
    """The size of a leaf's rank axis; 0 where it has none."""
    axes = leaf_schema(name).axes
    if "rank" not in axes:
        return 0
    last = axes[-1] == "rank"
    return leaf.shape[-1] if last else leaf.shape[n_stack]


# Jitted, since a loop outside jit would be compiled anew at every call.
@functools.partial(jax.jit, static_argnames=("f", "options"))
def over_stack(f: Callable[..., Any], layers: Layer, options: tuple[Any, ...] = ()) -> Any:
    """f(layer, *options) of each matrix of a stack, one at a time: only one is held in float32."""
    if layers["kernel"].shape[0] == 1:
        single = f(jax.tree.map(lambda leaf: leaf[0], layers), *options)
        return jax.tree.map(lambda leaf: leaf[None], single)
    return lax.map(lambda layer: f(layer, *options), layers)


def _axis_counts(layer: Layer) -> tuple[int, int]:
    """How many stack axes and how many out axes the kernel has, from the leaves beside it."""
    others = {name: leaf.ndim for name, leaf in layer.items() if name != "kernel"}
    n_stack = next(ndim for name, ndim in others.items() if leaf_schema(name).axes == ("stack",))
    for name, ndim in others.items():
        axes = leaf_schema(name).axes
        rest = ndim - n_stack - ("rank" in axes)
        if "out" in axes:
            return n_stack, rest
        if "in" in axes:
            return n_stack, layer["kernel"].ndim - n_stack - rest
    raise ValueError(f"the leaves {', '.join(layer)} do not tell the axes of their kernel")
