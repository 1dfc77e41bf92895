"""LoRA (2106.09685): y + s · x̃ A B, with s = alpha / r, or alpha / √r for rsLoRA (2312.03732)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms.dropout import dropped
from lorax_ft.lowrank.terms.term import Product, Term
from lorax_ft.mesh_axes import token_devices
from lorax_ft.tree import Layer

A, B, SCALE = "lora_a", "lora_b", "lora_scale"
FACTORS = (A, B)
INVOCATION, ROWS = "lora_invocation", "lora_rows"
"""Of an activated LoRA (`lorax_ft.lowrank.activation`): the tokens that activate it, at the tree's
root, and for each token of a batch, `[B, T]`, whether it acts there."""


def planned(plan: Plan) -> tuple[str, ...]:
    """A, B and s, where the method is LoRA."""
    return (A, B, SCALE) if plan.config.method == "lora" else ()


def after(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    """y + s · x̃ A B."""
    x_dropped = dropped(layer, x)
    change = low_rank(x_dropped, layer[A], layer[B], layer[SCALE], y.dtype, product)
    if ROWS in layer:
        change = jnp.where(expanded_to(layer[ROWS], change.ndim), change, 0)
    return y + change


def merge(layer: Layer, base: Layer) -> Layer:
    """W + s A B."""
    update = layer[SCALE] * highest_matmul(layer[A], layer[B])
    return base | {"kernel": base["kernel"] + update}


def low_rank(
    x: Array,
    a: Array,
    b: Array,
    s: Array,
    dtype: jnp.dtype,
    product: Product,
) -> Array:
    """s · x A B in `dtype`; the scale goes into B, the smallest of the three."""
    scaled_b = expanded_to(s, b.ndim) * b
    scaled_b = scaled_b.astype(dtype)
    z = product.dot(x, a.astype(dtype))  # [..., R]
    z = z.astype(dtype)
    return expand(z, scaled_b, n_stack=s.ndim, product=product)


def expand(
    z: Array,
    b: Array,
    *,
    n_stack: int,
    product: Product,
) -> Array:
    """z B: the rank in z's last axis becomes B's out axes.

    Stack axes that are left inside a layer count experts: z is then `[..., E, R]`, or its rows are
    sorted by expert.
    """
    if product.grouped is not None:
        return product.grouped.multiply(z, b)
    stack = b.shape[:n_stack]
    rank, *out_shape = b.shape[n_stack:]
    # All other axes are flattened: one matmul, or one for each expert.
    if n_stack:
        experts = math.prod(stack)
        b_flat = b.reshape(experts, rank, -1)
        z_flat = z.reshape(-1, experts, rank)
        y = jnp.einsum("zer,ero->zeo", z_flat, b_flat, precision=product.precision)
    else:
        b_flat = b.reshape(rank, -1)
        # One axis cannot be split over the devices of rows and over those of tokens.
        z_rows = z if token_devices() > 1 else z.reshape(-1, rank)
        y = jnp.matmul(z_rows, b_flat, precision=product.precision)
    return y.reshape(*z.shape[:-1], *out_shape)


def expanded_to(s: Array, ndim: int) -> Array:
    """A number for each matrix of a stack, `[*L]`, with axes of size 1 behind it."""
    further_axes = (1,) * (ndim - s.ndim)
    return s.reshape(s.shape + further_axes)


def ranks(layer: Layer) -> np.ndarray:
    """r of each matrix, `[L]`."""
    return used_ranks(layer[A], layer[B], layer[SCALE])


def used_ranks(a: Array, b: Array, s: Array) -> np.ndarray:
    """The columns of A, or rows of B, that are not padding, of each matrix: `[L]`."""
    scale = np.asarray(s)
    n = scale.ndim
    in_axes = tuple(range(n, a.ndim - 1))
    out_axes = tuple(range(n + 1, b.ndim))
    # Computed where the factors are: they may be spread over several hosts.
    in_a = jnp.any(a != 0, axis=in_axes)  # [*L, R]
    in_b = jnp.any(b != 0, axis=out_axes)  # [*L, R]
    is_used = np.asarray(in_a | in_b)
    counts = is_used.sum(axis=-1)
    is_adapted = scale != 0
    return (counts * is_adapted).reshape(-1)


TERM = Term(
    leaves=(A, B, SCALE),
    optional=(ROWS,),
    active=SCALE,
    negated=(SCALE,),
    takes_dropout=True,
    planned=planned,
    after=after,
    merge=merge,
    ranks=ranks,
)
