"""MiCA (2604.01694): B is frozen at the directions of the output that W uses least, and A = 0.

    W = U S Vᵀ,   B = V_mᵀ,   m the r smallest

The update stays in a subspace that the base hardly uses, and only A trains: half of LoRA's
parameters. The base is unchanged at first.
"""

from __future__ import annotations

import jax.numpy as jnp

from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.svd import nonzero


def mica(context: InitContext) -> InitResult:
    """A = 0, and B's rows orthonormal: those of the very smallest singular value come first."""
    _, scaled = context.truncated_svd(context.weight, last=True)  # √S Vᵀ
    size = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    return InitResult((context.zeros_a(), scaled / nonzero(size)))
