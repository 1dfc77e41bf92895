"""DoRA (2402.09353): y · m / n, with n = ‖W + s A B‖ of each output, a constant for the gradient.

With dropout it is x W + (m / n − 1) · x̃ W + (m / n) · s x̃ A B, as in PEFT: the magnitude acts on
the base's product with x̃. Letters: I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.lowrank.matrices import matrices_of, over_stack
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms import kept_start, low_rank
from lorax_ft.lowrank.terms.dropout import dropped
from lorax_ft.lowrank.terms.term import Product, Term, highest_matmul
from lorax_ft.quant.kernels import dense
from lorax_ft.tree import Layer, Shape

MAGNITUDE, NORM = "magnitude", "norm"
NORM_BLOCK = 2**22  # elements of W that the norm holds in float32 at once
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
    scaled = g * y.astype(jnp.float32)
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
    """‖W + A B‖ of one matrix over its rows, `[O]`, without W + A B itself.

        n² = ‖W‖² + 2 Σ B ∘ (Aᵀ W) + Σ B ∘ (Aᵀ A B),    with ‖ ‖ and Σ of each column

    W is read in blocks of at most `largest` elements, in float32.
    """
    a, b = _update(layer)  # [I, R], [R, O]
    squares, products = _sums_over_rows(dense(layer["kernel"]), a, largest)  # [O], [R, O]
    crossed = jnp.sum(b * products, axis=0)
    gram = highest_matmul(a.T, a)  # [R, R]
    own = jnp.sum(b * highest_matmul(gram, b), axis=0)
    # Rounding may leave a column that cancels slightly below 0.
    return jnp.sqrt(jnp.maximum(squares + 2 * crossed + own, 0))


def _update(layer: Layer) -> tuple[Array, Array]:
    """What is added to W as one A B: the adapter, and the start that is taken away."""
    a, b = layer[low_rank.A], layer[low_rank.SCALE] * layer[low_rank.B]
    if kept_start.SCALE in layer:
        start = layer[kept_start.SCALE] * layer[kept_start.B0]
        a = jnp.concatenate([a, layer[kept_start.A0]], axis=1)
        b = jnp.concatenate([b, -start])
    return a, b


def _sums_over_rows(kernel: Array, a: Array, largest: int) -> tuple[Array, Array]:
    """Σ W² `[O]` and Aᵀ W `[R, O]`, over blocks of rows, in float32."""

    def sums(w: Array, a: Array) -> tuple[Array, Array]:
        w = w.astype(jnp.float32)
        return jnp.sum(w**2, axis=0), highest_matmul(a.T, w)

    rows, columns = kernel.shape
    blocks = _blocks(rows, columns, largest)
    if blocks == 1:
        return sums(kernel, a)
    # Every k-th row, so that a sharded axis stays sharded.
    strided = [leaf.reshape(rows // blocks, blocks, -1) for leaf in (kernel, a)]
    take: Callable[[Array, Array], Array] = functools.partial(
        lax.dynamic_index_in_dim, axis=1, keepdims=False
    )

    def add_block(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        block = sums(*(take(leaf, i) for leaf in strided))
        return total[0] + block[0], total[1] + block[1]

    zeros = (jnp.zeros(columns, jnp.float32), jnp.zeros((a.shape[1], columns), jnp.float32))
    return lax.fori_loop(0, blocks, add_block, zeros)


def _blocks(rows: int, columns: int, largest: int) -> int:
    """The smallest number of equal blocks of rows that hold at most `largest` elements each."""
    for blocks in range(1, rows):
        elements = rows // blocks * columns
        if rows % blocks == 0 and elements <= largest:
            return blocks
    return rows


TERM = Term(
    leaves=(MAGNITUDE,),
    optional=(NORM,),
    needs=(low_rank.A, low_rank.B, low_rank.SCALE),
    multiplies=True,
    planned=planned,
    initial=initial,
    after=after,
    merge=merge,
)
