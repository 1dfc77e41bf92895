"""DoRA (2402.09353): y · m / n, with n = ‖W + s A B‖ of each output, a constant for the gradient.

With dropout it is x W + (m / n − 1) · x̃ W + (m / n) · s x̃ A B, as in PEFT: the magnitude acts on
the base's product with x̃. Letters: I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.lowrank.matrices import matrices_of, over_stack
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms import kept_start, low_rank
from lorax_ft.lowrank.terms.dropout import dropped
from lorax_ft.lowrank.terms.term import Product, Term, saved
from lorax_ft.quant.kernels import dense
from lorax_ft.schema import leaf_schema
from lorax_ft.tree import Layer, Shape

MAGNITUDE, NORM = "magnitude", "norm"
NORM_BLOCK = 2**22  # elements of W + s A B that the norm holds at once
DIRECTION = (kept_start.TERM, low_rank.TERM)
"""The terms whose sum with W is the direction that m / n scales."""


def planned(plan: Plan) -> tuple[str, ...]:
    """The magnitude alone: its norm is derived."""
    return (MAGNITUDE,) if plan.config.dora else ()


def initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """m = ‖W + s A B‖, so that m / n = 1."""
    return {MAGNITUDE: column_norm(layer)} if plan.config.dora else {}


def after(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    """g · y with g = m / n; with dropout also (1 − g) · (x − x̃) W, so that x itself meets W."""
    if NORM not in layer:
        raise ValueError(
            "this layer has a DoRA magnitude without its norm; "
            "call lorax_ft.with_norms(params, layout=layout) first"
        )
    g = product.leaf(gain(layer))
    # The gradient of m needs y.
    scaled = g * saved(y).astype(jnp.float32)
    x_dropped = dropped(layer, x)
    # Without dropout `dropped` returns x itself, and the second product with W is not needed.
    if x_dropped is not x:
        lost = x - x_dropped
        base = product.dot(lost, layer["kernel"])
        base = kept_start.after(layer, lost, base, product)
        scaled = scaled + (1 - g) * base.astype(jnp.float32)
    return scaled.astype(y.dtype)


def merge(layer: Layer, base: Layer) -> Layer:
    """(W + s A B) · m / n of one matrix."""
    return base | {"kernel": base["kernel"] * gain(layer)}


def gain(layer: Layer) -> Array:
    """m / n in float32: 0 where n = 0, and 1 in matrices of a stack that are not adapted."""
    m = layer[MAGNITUDE]
    n = layer[NORM]
    scale = low_rank.expanded_to(layer[low_rank.SCALE], m.ndim)
    adapted = scale != 0
    # The gradient of m / 0 would be NaN even where the result is not used.
    safe_n = jnp.where(n > 0, n, 1)
    ratio = jnp.where(n > 0, m / safe_n, 0)
    return jnp.where(adapted, ratio, 1)


def with_norm(layer: Layer) -> Layer:
    """The layer, in canonical order, with n beside its magnitude, if it has one."""
    if MAGNITUDE not in layer or NORM in layer:
        return layer
    return layer | {NORM: column_norm(layer)}


def column_norm(layer: Layer) -> Array:
    """n = ‖W + s A B‖ over the in axes, `[*L, *out]` in float32, a constant for the gradient.

    One matrix of the stack is computed at a time, and of a large one every k-th row, so that no
    full-size temporary exists and a sharded axis stays sharded.

    Args:
      layer: leaves in canonical order, kernel included.
    """
    direction = {"kernel": lax.stop_gradient(layer["kernel"])}
    for term in DIRECTION:
        for name in term.all_leaves:
            if name in layer:
                direction[name] = lax.stop_gradient(layer[name])
    matrices = matrices_of(direction)
    norms = over_stack(_norm, matrices, options=(NORM_BLOCK,))  # [L, O]
    stack = layer[low_rank.SCALE].shape
    n_stack = len(stack)
    out_shape = layer[low_rank.B].shape[n_stack + 1 :]
    return norms.reshape(*stack, *out_shape)


def _norm(layer: Layer, largest: int) -> Array:
    """‖W + s A B‖ of one matrix over its rows, `[O]`, in blocks of at most `largest` elements."""
    kernel = dense(layer["kernel"])
    layer = layer | {"kernel": kernel}
    rows, columns = kernel.shape
    # A slice of the rows needs those rows of W, A and A₀, and all of the others.
    by_row = {name: leaf for name, leaf in layer.items() if "in" in leaf_schema(name).axes}
    blocks = _blocks(rows, columns, largest)
    if blocks == 1:
        squares = _squares(layer, by_row)
        return jnp.sqrt(squares)
    strided = {}
    for name, leaf in by_row.items():
        strided[name] = leaf.reshape(rows // blocks, blocks, -1)

    def add_block(i: Array, squares: Array) -> Array:
        take: Callable[[Array], Array] = functools.partial(
            lax.dynamic_index_in_dim, index=i, axis=1, keepdims=False
        )
        block = jax.tree.map(take, strided)
        return squares + _squares(layer, block)

    zeros = jnp.zeros(columns, jnp.float32)
    squares = lax.fori_loop(0, blocks, add_block, zeros)
    return jnp.sqrt(squares)


def _blocks(rows: int, columns: int, largest: int) -> int:
    """The smallest number of equal blocks of rows that hold at most `largest` elements each."""
    for blocks in range(1, rows):
        elements = rows // blocks * columns
        if rows % blocks == 0 and elements <= largest:
            return blocks
    return rows


def _squares(layer: Layer, part: Layer) -> Array:
    """The sum of squares of W + s A B over some of its rows, `[O]`."""
    base = {"kernel": part["kernel"].astype(jnp.float32)}
    for term in DIRECTION:
        if term.leaves[0] in layer:
            assert term.merge is not None
            base = term.merge(layer | part, base)
    return jnp.sum(base["kernel"] ** 2, axis=0)


TERM = Term(
    leaves=(MAGNITUDE,),
    optional=(NORM,),
    needs=(low_rank.A, low_rank.B, low_rank.SCALE),
    loses_base=True,
    planned=planned,
    initial=initial,
    after=after,
    merge=merge,
)
