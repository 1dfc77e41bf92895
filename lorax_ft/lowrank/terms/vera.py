"""VeRA (2310.11454): all layers share one frozen random A and B, and each trains two vectors.

    y = x W + b ⊙ ((d ⊙ (x̃ A)) B)

As the product of x̃, A and B' = d ⊙ B ⊙ b it is LoRA's, and B' is the size of one layer's B. A layer
of I inputs and O outputs uses the first I rows of A and the first O columns of B, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.keys import fold_path
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms import low_rank
from lorax_ft.lowrank.terms.dropout import dropped
from lorax_ft.lowrank.terms.term import Product, Term, check_no_embedding
from lorax_ft.tree import Layer, Shape

A, B = "vera_a", "vera_b"
LAMBDA_D, LAMBDA_B, ACTIVE = "vera_lambda_d", "vera_lambda_b", "vera_active"


def planned(plan: Plan) -> tuple[str, ...]:
    """d and b, where the method is VeRA."""
    if plan.config.method != "vera":
        return ()
    check_no_embedding(plan)
    return (LAMBDA_D, LAMBDA_B, ACTIVE)


def initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """b = 0, so that the base is unchanged at first; d is a small constant."""
    if ACTIVE not in shapes:
        return {}
    return {
        LAMBDA_D: jnp.full(shapes[LAMBDA_D], plan.config.vera_d_initial, jnp.float32),
        LAMBDA_B: jnp.zeros(shapes[LAMBDA_B], jnp.float32),
        ACTIVE: jnp.asarray(plan.ranks > 0, jnp.float32),
    }


def initial_shared(shapes: Mapping[str, Shape], key: Array) -> Layer:
    """A and B uniform in ±√(6 / inputs), as in PEFT; the inputs of A are I, and of B they are R."""
    leaves = {}
    for name, shape in shapes.items():
        inputs, _ = shape
        bound = (6 / inputs) ** 0.5
        own_key = fold_path(key, name)
        leaves[name] = jax.random.uniform(own_key, shape, jnp.float32, -bound, bound)
    return leaves


def after(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    """y + x̃ A B'."""
    _check_shared(layer)
    active = layer[ACTIVE]
    n_stack = active.ndim
    # The experts of a layer share the two matrices too.
    a = jnp.broadcast_to(layer[A], active.shape + layer[A].shape)
    d = low_rank.expanded_to(layer[LAMBDA_D], n_stack + layer[B].ndim)
    b = jnp.expand_dims(layer[LAMBDA_B], n_stack)
    x_dropped = dropped(layer, x)
    return y + low_rank.low_rank(x_dropped, a, d * layer[B] * b, active, y.dtype, product)


def merge(layer: Layer, base: Layer) -> Layer:
    """W + A B'."""
    _check_shared(layer)
    scaled_b = layer[LAMBDA_D][:, None] * layer[B] * layer[LAMBDA_B]
    update = layer[ACTIVE] * highest_matmul(layer[A], scaled_b)
    return base | {"kernel": base["kernel"] + update}


def ranks(layer: Layer) -> np.ndarray:
    """r of each matrix, `[L]`."""
    is_adapted = np.asarray(layer[ACTIVE]) != 0
    return is_adapted.reshape(-1) * layer[LAMBDA_D].shape[-1]


def _check_shared(layer: Layer) -> None:
    """Raise where a layer was taken out of its tree without the matrices that all share."""
    if A not in layer or B not in layer:
        raise ValueError(
            f"this layer has VeRA's {LAMBDA_D} but no {A} and {B}, which lie at the tree's root; "
            "give adapt or merge_adapters the whole tree"
        )


TERM = Term(
    leaves=(LAMBDA_D, LAMBDA_B, ACTIVE),
    shared=(A, B),
    active=ACTIVE,
    negated=(LAMBDA_B,),
    takes_dropout=True,
    any_rank=True,
    planned=planned,
    initial=initial,
    initial_shared=initial_shared,
    after=after,
    merge=merge,
    ranks=ranks,
)
