"""Where arrays inside the step are split: constraints for XLA on the ambient mesh."""

from __future__ import annotations

import math

from jax import Array, lax
from jax.sharding import PartitionSpec as P

from lorax_ft.mesh_axes import ROW_AXES, TOKEN_AXIS, ambient_sizes, dividing, token_devices


def split_tokens(x: Array) -> Array:
    """x `[B, T, ...]` with its rows and tokens split over the ambient mesh, if they divide.

    Without it XLA may leave the width split, as the embedding table is, and gather the whole batch
    on every device.
    """
    rows, tokens = x.shape[:2]
    axes = (dividing(ROW_AXES, rows), dividing(TOKEN_AXIS, tokens))
    if axes == (None, None):
        return x
    spec = [P.UNCONSTRAINED if axis is None else axis for axis in axes]
    return lax.with_sharding_constraint(x, P(*spec))


def split_embedded(x: Array) -> Array:
    """x `[B, T, D]` as an embedding table gives it, with D split, on the way to `split_tokens`.

    The devices of fsdp exchange width for rows, and then those of context width for tokens: XLA
    does not find the two steps by itself, and would gather the whole batch.
    """
    if token_devices() == 1:
        return x
    rows, _, width = x.shape
    spec = P(dividing(ROW_AXES, rows), None, dividing(TOKEN_AXIS, width))
    return split_tokens(lax.with_sharding_constraint(x, spec))


def whole(x: Array) -> Array:
    """x whole on every device of the ambient mesh."""
    if math.prod(ambient_sizes().values()) == 1:
        return x
    return lax.with_sharding_constraint(x, P())


def gather_inputs(kernel: Array) -> Array:
    """A kernel `[I, O]` with its inputs whole on every device, and its outputs split over tensor.

    For a kernel that a loop uses: XLA would else gather it in each iteration.
    """
    if math.prod(ambient_sizes().values()) == 1:
        return kernel
    return lax.with_sharding_constraint(kernel, P(None, dividing("tensor", kernel.shape[1])))


def keep_tokens_split(x: Array) -> Array:
    """x `[B, T, ...]` with its tokens split where the ambient mesh splits them, and the rest free.

    For what XLA would else gather around `split_heads`.
    """
    rows, tokens = x.shape[:2]
    if token_devices() == 1 or dividing(TOKEN_AXIS, tokens) is None:
        return x
    free = [P.UNCONSTRAINED] * (x.ndim - 2)
    return lax.with_sharding_constraint(x, P(dividing(ROW_AXES, rows), TOKEN_AXIS, *free))


def split_heads(x: Array) -> Array:
    """x `[B, T, H, ...]` with its heads split in place of its tokens, if the ambient mesh has both.

    For what is computed along a row. Heads that do not divide are whole on every device.
    """
    if token_devices() == 1:
        return x
    rows, _, heads = x.shape[:3]
    split_over = dividing(("tensor", TOKEN_AXIS), heads)
    return lax.with_sharding_constraint(x, P(dividing(ROW_AXES, rows), None, split_over))
