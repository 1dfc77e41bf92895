"""MiSS (2409.15371): the shards of the input share one small matrix D, which starts at 0.

    y = x W + Σ_k x[k r … (k + 1) r] D = x (W + P D),    P[i, j] = 1 where i mod r = j

P is a column of r × r identity matrices, so it is computed and not stored. Letters: I inputs, R the
largest rank, r each matrix's own, O outputs.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms.dropout import dropped
from lorax_ft.lowrank.terms.low_rank import expand
from lorax_ft.lowrank.terms.term import Product, Term
from lorax_ft.tree import Layer, Shape

D, RANK = "miss_block", "miss_rank"


def planned(plan: Plan) -> tuple[str, ...]:
    """D and r, where the method is MiSS."""
    if plan.config.method != "miss":
        return ()
    if plan.spec.module == "embed":
        raise ValueError(f"{plan.paths[0]}: MiSS is not for embeddings; exclude them")
    return (D, RANK)


def initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """D = 0, so that the base is unchanged at first."""
    if D not in shapes:
        return {}
    return {
        D: jnp.zeros(shapes[D], jnp.float32),
        RANK: jnp.asarray(plan.ranks, jnp.float32),
    }


def after(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    """y + x̃ P D."""
    d = layer[D].astype(y.dtype)
    rank = layer[RANK]
    n_stack = rank.ndim
    width = d.shape[n_stack]
    p = shards(rank, product.in_shape, width=width)
    x_dropped = dropped(layer, x)
    z = product.dot(x_dropped, p.astype(y.dtype))  # [..., R]
    z = z.astype(y.dtype)
    return y + expand(z, d, n_stack=n_stack, product=product)


def merge(layer: Layer, base: Layer) -> Layer:
    """W + P D."""
    kernel = base["kernel"]
    d = layer[D]
    rows, _ = kernel.shape
    p = shards(layer[RANK], (rows,), width=len(d))
    return base | {"kernel": kernel + highest_matmul(p, d)}


def shards(rank: Array, in_shape: Shape, *, width: int) -> Array:
    """P `[*E, *in, R]` for ranks `[*E]`; all 0 for a matrix that is not adapted."""
    inputs = int(np.prod(in_shape))
    whole = rank.astype(jnp.int32)[..., None]
    # A rank of 0 would divide by zero; its P is 0 because no column is below it.
    place = jnp.arange(inputs) % jnp.maximum(whole, 1)  # [*E, I]
    column = jnp.arange(width)
    is_place = place[..., None] == column
    is_used = column < whole[..., None]
    p = is_place & is_used  # [*E, I, R]
    p = p.reshape(*rank.shape, *in_shape, width)
    return p.astype(jnp.float32)


def ranks(layer: Layer) -> np.ndarray:
    """r of each matrix, `[L]`."""
    own_ranks = np.asarray(layer[RANK])
    return own_ranks.reshape(-1).astype(int)


TERM = Term(
    leaves=(D, RANK),
    active=RANK,
    negated=(D,),
    takes_dropout=True,
    planned=planned,
    initial=initial,
    after=after,
    merge=merge,
    ranks=ranks,
)
