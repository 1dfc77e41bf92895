"""LoKr (2212.10650): ΔW is a Kronecker product of two small matrices, of which K₂ may be A B.

    y = x W + s · x̃ (K₁ ⊗ K₂),    s = alpha / r,    I = i₁ i₂,    O = o₁ o₂

with K₁ `[i₁, o₁]` and K₂ `[i₂, o₂]`. ΔW is never formed: with x̃ as a matrix X `[i₁, i₂]`, the
output is K₁ᵀ X K₂ as a vector, in I o₂ + O i₁ products a token. K₂ is A B of rank r, unless r is at
least half of its larger side, as in PEFT. Letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.random import uniform_a
from lorax_ft.lowrank.keys import drawn
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms.dropout import dropped
from lorax_ft.lowrank.terms.term import Product, Term, check_dense
from lorax_ft.schema import Axis
from lorax_ft.tree import Layer, Shape

LEFT, RIGHT, RIGHT_A, RIGHT_B, SCALE = (
    "lokr_left",
    "lokr_right",
    "lokr_right_a",
    "lokr_right_b",
    "lokr_scale",
)


def planned(plan: Plan) -> tuple[str, ...]:
    """K₁, s, and K₂ or its A and B, where the method is LoKr.

    Raises:
      ValueError: the module is not a dense layer, or its stack has several ranks.
    """
    if plan.config.method != "lokr":
        return ()
    check_dense(plan)
    adapted = sorted({int(rank) for rank in plan.ranks.flat if rank})
    if len(adapted) > 1:
        raise ValueError(
            f"{plan.paths[0]}: adapter.rank_pattern gives the layers of its stack the ranks "
            f"{adapted}, and LoKr needs one, which decides the form of K2"
        )
    sizes = own_sizes(plan)
    larger_side = max(sizes["right_in"], sizes["right_out"])
    if plan.width >= larger_side / 2:
        return (LEFT, RIGHT, SCALE)
    return (LEFT, RIGHT_A, RIGHT_B, SCALE)


def own_sizes(plan: Plan) -> dict[Axis, int]:
    """i₁, i₂, o₁ and o₂."""
    left_in, right_in = split(plan.rows, plan.config.lokr_factor)
    left_out, right_out = split(plan.columns, plan.config.lokr_factor)
    return {
        "left_in": left_in,
        "left_out": left_out,
        "right_in": right_in,
        "right_out": right_out,
    }


def split(size: int, factor: int | None) -> tuple[int, int]:
    """Two factors of `size`, the smaller first: as equal as they can be, or `factor` and the rest.

    Where `factor` does not divide the size, the smaller one is at most `factor`; as in PEFT.

    >>> split(128, None), split(127, None), split(128, 4), split(576, 7)
    ((8, 16), (1, 127), (4, 32), (6, 96))
    """
    if factor is not None and size % factor == 0:
        return factor, size // factor
    most = size if factor is None else factor
    divisors = [f for f in range(1, math.isqrt(size) + 1) if size % f == 0]
    smaller = max(f for f in divisors if f <= most)
    return smaller, size // smaller


def initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """K₁ = 0, so that the base is unchanged at first; K₂, or A and B, uniform in ±1/√rows."""
    if SCALE not in shapes:
        return {}
    leaves = {
        LEFT: jnp.zeros(shapes[LEFT], jnp.float32),
        SCALE: jnp.asarray(plan.scales),
    }
    for name in (RIGHT, RIGHT_A, RIGHT_B):
        if name in shapes:
            rows, columns = shapes[name][-2:]
            sample = functools.partial(uniform_a, rows=rows, rank=columns)
            leaves[name] = drawn(key, plan.paths, name, sample).reshape(shapes[name])
    return leaves


def after(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    """y + s · x̃ (K₁ ⊗ K₂)."""
    left = layer[LEFT].astype(y.dtype)
    right = (layer[SCALE] * second(layer)).astype(y.dtype)
    right_in, _ = right.shape
    x_dropped = dropped(layer, x).astype(y.dtype)
    x_matrix = x_dropped.reshape(*x.shape[:-1], -1, right_in)  # [..., i₁, i₂]
    z = jnp.matmul(x_matrix, right, precision=product.precision)  # [..., i₁, o₂]
    change = jnp.einsum("...io,ij->...jo", z, left, precision=product.precision)
    return y + change.reshape(y.shape)


def merge(layer: Layer, base: Layer) -> Layer:
    """W + s K₁ ⊗ K₂."""
    update = jnp.kron(layer[LEFT], second(layer))
    return base | {"kernel": base["kernel"] + layer[SCALE] * update}


def second(layer: Layer) -> Array:
    """K₂ `[i₂, o₂]`."""
    if RIGHT in layer:
        return layer[RIGHT]
    if RIGHT_B not in layer:
        raise ValueError(f"this layer has the leaf {RIGHT_A!r} but no {RIGHT_B!r}")
    return highest_matmul(layer[RIGHT_A], layer[RIGHT_B])


def ranks(layer: Layer) -> np.ndarray:
    """r of each matrix, `[L]`; where K₂ is whole, its smaller side."""
    right = layer[RIGHT] if RIGHT in layer else layer[RIGHT_B]
    is_adapted = np.asarray(layer[SCALE]) != 0
    return is_adapted.reshape(-1) * min(right.shape[-2:])


TERM = Term(
    leaves=(LEFT, SCALE),
    one_of=(RIGHT, RIGHT_A),
    optional=(RIGHT_B,),
    active=SCALE,
    negated=(SCALE,),
    takes_dropout=True,
    any_rank=True,
    planned=planned,
    sizes=own_sizes,
    initial=initial,
    after=after,
    merge=merge,
    ranks=ranks,
)
