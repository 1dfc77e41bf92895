"""HiRA (ICLR 2025): ΔW is the elementwise product of W and A B, so its rank may be W's own.

    y = x W + x̃ (W ∘ (A B))

The backward pass forms the gradient of ΔW, as full fine-tuning does. ΔW is held for one layer at a
time, and computed again in the backward pass.
Letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.context import within_ranks
from lorax_ft.lowrank.inits.random import uniform_a
from lorax_ft.lowrank.keys import drawn
from lorax_ft.lowrank.plan import Plan
from lorax_ft.lowrank.terms import low_rank
from lorax_ft.lowrank.terms.term import Term, check_single_matrix
from lorax_ft.tree import Layer, Shape

A, B, ACTIVE = "hira_a", "hira_b", "hira_active"


def planned(plan: Plan) -> tuple[str, ...]:
    """A and B, where the method is HiRA."""
    if plan.config.method != "hira":
        return ()
    check_single_matrix(plan)
    return (A, B, ACTIVE)


def initial(layer: Layer, plan: Plan, shapes: dict[str, Shape], key: Array) -> Layer:
    """A uniform in ±1/√I as LoRA's, and B = 0, so that the base is unchanged at first."""
    if ACTIVE not in shapes:
        return {}
    sample_a = functools.partial(uniform_a, rows=plan.rows, rank=plan.width)
    drawn_a = drawn(key, plan.paths, A, sample_a)
    zeros = jnp.zeros((len(plan.paths), plan.width, plan.columns), jnp.float32)
    a, b = within_ranks((drawn_a, zeros), plan.ranks.reshape(-1))
    return {
        A: a.reshape(shapes[A]),
        B: b.reshape(shapes[B]),
        ACTIVE: jnp.asarray(plan.ranks > 0, jnp.float32),
    }


def update(layer: Layer, w: Array) -> Array:
    """W ∘ (A B)."""
    *stack, rows, columns = w.shape
    rank = layer[A].shape[-1]
    active = low_rank.expanded_to(layer[ACTIVE], w.ndim)
    a = active * layer[A].reshape(*stack, rows, rank)
    b = layer[B].reshape(*stack, rank, columns)
    return w * highest_matmul(a, b).astype(w.dtype)


def ranks(layer: Layer) -> np.ndarray:
    """r of each matrix, `[L]`."""
    return low_rank.used_ranks(layer[A], layer[B], layer[ACTIVE])


TERM = Term(
    leaves=(A, B, ACTIVE),
    active=ACTIVE,
    loses_base=True,
    takes_dropout=True,
    planned=planned,
    initial=initial,
    update=update,
    ranks=ranks,
)
