"""LoRA's own starts (2106.09685): A is random and B = 0, so that the base is unchanged at first.

A matrix's values depend on its key alone, and a smaller rank is a prefix of a larger one, so that
stacked and unstacked layers, and layers of any rank, agree.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.lowrank.inits.context import InitContext, InitResult


def kaiming(context: InitContext) -> InitResult:
    """A uniform in ±1/√I, as in PEFT (Kaiming's rule with a = √5); B = 0."""
    _, rows, _ = context.shape
    a = context.draw(uniform_a, rows)
    return InitResult((a, context.zeros_b()))


def gaussian(context: InitContext) -> InitResult:
    """A ~ N(0, 1/r²), as PEFT's "gaussian", with each matrix's own r; B = 0."""
    _, rows, _ = context.shape
    # Matrices that are not adapted have rank 0.
    own_ranks = np.maximum(context.ranks, 1).astype(np.float32)
    a = context.draw(normal_a, rows) / own_ranks[:, None, None]
    return InitResult((a, context.zeros_b()))


def uniform_a(key: Array, rows: int, *, rank: int) -> Array:
    """A `[I, R]`, uniform in ±1/√I."""
    bound = rows**-0.5
    # Drawn as Aᵀ, whose first rows do not depend on the rank.
    a_transposed = jax.random.uniform(key, (rank, rows), jnp.float32, -bound, bound)
    return a_transposed.T


def normal_a(key: Array, rows: int, *, rank: int) -> Array:
    """A `[I, R]`, standard normal."""
    a_transposed = jax.random.normal(key, (rank, rows), jnp.float32)
    return a_transposed.T


def normal_b(key: Array, columns: int, *, rank: int) -> Array:
    """B `[R, O]`, standard normal."""
    return jax.random.normal(key, (rank, columns), dtype=jnp.float32)
