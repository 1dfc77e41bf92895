"""The matrix product of norms, starts and merges."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def highest_matmul(a: Array, b: Array) -> Array:
    """A B in float32. Accelerators multiply float32 in fewer bits unless told otherwise."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
