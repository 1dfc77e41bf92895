"""LoHa (2108.06098): ΔW is the elementwise product of two low-rank matrices, of a rank up to r².

    y = x W + s · x̃ ((A₁ B₁) ∘ (A₂ B₂)),    s = alpha / r

The elementwise product of two matrices of rank r is one product of two factors of rank r²:

    (A₁ B₁) ∘ (A₂ B₂) = A B,    A[i, jk] = A₁[i, j] A₂[i, k],    B[jk, o] = B₁[j, o] B₂[k, o]

so ΔW is never formed: a token costs r² (I + O) products, which is less than the I O of ΔW while
r² < I O / (I + O), such as for r up to 45 where I = O = 4096. Letters: I inputs, O outputs, R the
largest rank, r each matrix's own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.context import within_ranks
from lorax_ft.lowrank.inits.random import uniform_a
from lorax_ft.lowrank.keys import drawn
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms import low_rank
from lorax_ft.lowrank.terms.dropout import dropped
from lorax_ft.lowrank.terms.term import Product, Term, check_no_embedding
from lorax_ft.tree import Layer, Shape

A1, B1, A2, B2, SCALE = "loha_a1", "loha_b1", "loha_a2", "loha_b2", "loha_scale"


def planned(plan: Plan) -> tuple[str, ...]:
    """The four factors and s, where the method is LoHa."""
    if plan.config.method != "loha":
        return ()
    check_no_embedding(plan)
    return (A1, B1, A2, B2, SCALE)


def initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """A₂ = 0, so that the base is unchanged at first; the others uniform as in PEFT."""
    if SCALE not in shapes:
        return {}
    ranks = plan.ranks.reshape(-1)
    sample_a = functools.partial(uniform_a, rows=plan.rows, rank=plan.width)
    a1 = drawn(key, plan.paths, A1, sample_a)
    b1 = _uniform_b(key, plan, B1)
    b2 = _uniform_b(key, plan, B2)
    a1, b1 = within_ranks((a1, b1), ranks)
    _, b2 = within_ranks((a1, b2), ranks)
    return {
        A1: a1.reshape(shapes[A1]),
        B1: b1.reshape(shapes[B1]),
        A2: jnp.zeros(shapes[A2], jnp.float32),
        B2: b2.reshape(shapes[B2]),
        SCALE: jnp.asarray(plan.scales),
    }


def after(
    layer: Layer,
    x: Array,
    y: Array,
    product: Product,
) -> Array:
    """y + s · x̃ A B."""
    scale = layer[SCALE]
    n_stack = scale.ndim
    a = layer[A1][..., :, None] * layer[A2][..., None, :]
    a = a.reshape(*a.shape[:-2], -1)  # [*E, *in, R²]
    b1 = jnp.expand_dims(layer[B1], n_stack + 1)
    b2 = jnp.expand_dims(layer[B2], n_stack)
    b = b1 * b2
    b = b.reshape(*scale.shape, -1, *b.shape[n_stack + 2 :])  # [*E, R², *out]
    x_dropped = dropped(layer, x)
    return y + low_rank.low_rank(x_dropped, a, b, scale, y.dtype, product)


def merge(layer: Layer, base: Layer) -> Layer:
    """W + s (A₁ B₁) ∘ (A₂ B₂)."""
    first = highest_matmul(layer[A1], layer[B1])
    second = highest_matmul(layer[A2], layer[B2])
    return base | {"kernel": base["kernel"] + layer[SCALE] * first * second}


def ranks(layer: Layer) -> np.ndarray:
    """r of each matrix, `[L]`."""
    return low_rank.used_ranks(layer[A1], layer[B1], layer[SCALE])


def _uniform_b(key: Array, plan: Plan, name: str) -> Array:
    """A factor `[L, R, O]`, uniform in ±1/√r."""
    shape = (plan.width, plan.columns)

    def sample(key: Array) -> Array:
        return jax.random.uniform(key, shape, jnp.float32, -1, 1)

    # Matrices that are not adapted have rank 0.
    own_ranks = np.maximum(plan.ranks.reshape(-1), 1).astype(np.float32)
    return drawn(key, plan.paths, name, sample) / np.sqrt(own_ranks)[:, None, None]


TERM = Term(
    leaves=(A1, B1, A2, B2, SCALE),
    active=SCALE,
    negated=(SCALE,),
    takes_dropout=True,
    planned=planned,
    initial=initial,
    after=after,
    merge=merge,
    ranks=ranks,
)
