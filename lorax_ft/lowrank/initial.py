"""How A and B start where the base stays as it is: at random, with B = 0 (on an embedding, A = 0).

A matrix's values depend on its key alone and a smaller rank is a prefix of a larger one, so that
stacked and unstacked layers, and layers of any rank, agree.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def kaiming(key: Array, rows: int, *, rank: int) -> Array:
    """A `[in, r]`, uniform in ±1/√in, as PEFT starts it (Kaiming's rule with a = √5)."""
    bound = rows**-0.5
    return jax.random.uniform(key, (rank, rows), jnp.float32, -bound, bound).T


def gaussian(key: Array, rows: int, *, rank: int) -> Array:
    """A · r `[in, r]`, standard normal: over the matrix's own rank it is PEFT's "gaussian", of deviation 1 / r."""
    return jax.random.normal(key, (rank, rows), jnp.float32).T


def embedding(key: Array, columns: int, *, rank: int) -> Array:
    """B `[r, out]` of an embedding, standard normal; its A is 0."""
    return jax.random.normal(key, (rank, columns), dtype=jnp.float32)
