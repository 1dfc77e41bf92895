"""Quantizing a stack a matrix at a time, so that the whole of it never exists."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.quant.kernels import Quantized


def streamed(
    matrix: Callable[[tuple[int, ...]], Quantized],
    *,
    stack: tuple[int, ...],
    like: Quantized,
    on: Quantized,
) -> Quantized:
    """A quantized stack on its devices.

    Args:
      matrix: gives the matrix at an index of the stack, quantized and without stack axes.
      stack: L, the shape of the stack.
      like: the shapes of the stack's parts (`jax.ShapeDtypeStruct`).
      on: the sharding of each part; stack axes are whole.
    """
    n = len(stack)
    shapes, treedef = jax.tree.flatten(like)
    places = jax.tree.leaves(on)
    held: list[dict[Any, Array]] = [{} for _ in shapes]
    for i, index in enumerate(np.ndindex(*stack)):
        parts = jax.tree.leaves(matrix(index))
        for part, shape, place, stacks in zip(parts, shapes, places, held, strict=True):
            for device, where in place.addressable_devices_indices_map(shape.shape).items():
                piece = jax.device_put(part[where[n:]], device)
                if device not in stacks:
                    stacks[device] = jnp.zeros(
                        (math.prod(stack), *piece.shape), piece.dtype, device=device
                    )
                stacks[device] = _put(stacks[device], piece, i)
        # Before the next is read, or many would be on their way. (Devices as keys have no order, as a tree's must.)
        jax.block_until_ready([list(stacks.values()) for stacks in held])
    whole = [
        jax.make_array_from_single_device_arrays(
            shape.shape, place, [leaf.reshape(*stack, *leaf.shape[1:]) for leaf in stacks.values()]
        )
        for shape, place, stacks in zip(shapes, places, held, strict=True)
    ]
    return jax.tree.unflatten(treedef, whole)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Array, part: Array, i: int) -> Array:
    return stack.at[i].set(part)
