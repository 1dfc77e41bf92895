"""Quantizing a stack one matrix at a time: the unquantized stack never exists as a whole."""

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
from lorax_ft.tree import Shape


def streamed(
    matrix: Callable[[tuple[int, ...]], Quantized],
    *,
    stack: Shape,
    like: Quantized,
    on: Quantized,
) -> Quantized:
    """A quantized stack on its devices.

    Args:
      matrix: returns the quantized matrix at an index of the stack, without stack axes.
      stack: L, the shape of the stack.
      like: the shapes of the stack's parts (`jax.ShapeDtypeStruct`).
      on: the sharding of each part, in which stack axes are not split.
    """
    shapes, treedef = jax.tree.flatten(like)
    shardings = jax.tree.leaves(on)
    # For each part its shard on every device of this process.
    shards: list[dict[Any, Array]] = [{} for _ in shapes]
    for i, index in enumerate(np.ndindex(*stack)):
        parts = jax.tree.leaves(matrix(index))
        by_part = zip(parts, shapes, shardings, shards, strict=True)
        for part, shape, sharding, held in by_part:
            indices = sharding.addressable_devices_indices_map(shape.shape)
            for device, where in indices.items():
                where_in_matrix = where[len(stack) :]
                piece = jax.device_put(part[where_in_matrix], device)
                if device not in held:
                    held_shape = (math.prod(stack), *piece.shape)
                    held[device] = jnp.zeros(held_shape, piece.dtype, device=device)
                held[device] = _put(held[device], piece, i)
        # Dispatch is asynchronous: without this wait many matrices would be in memory at once.
        # (JAX sorts a dictionary's keys, and devices cannot be sorted: hence the lists.)
        jax.block_until_ready([list(held.values()) for held in shards])

    arrays = []
    for shape, sharding, held in zip(shapes, shardings, shards, strict=True):
        pieces = [_with_stack_axes(shard, stack) for shard in held.values()]
        array = jax.make_array_from_single_device_arrays(shape.shape, sharding, pieces)
        arrays.append(array)
    return jax.tree.unflatten(treedef, arrays)


def _with_stack_axes(shard: Array, stack: Shape) -> Array:
    """A shard whose first axis counts matrices, with the axes of the stack in its place."""
    matrix_shape = shard.shape[1:]
    return shard.reshape(*stack, *matrix_shape)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Array, part: Array, i: int) -> Array:
    """The stack with a matrix at place i."""
    return stack.at[i].set(part)
