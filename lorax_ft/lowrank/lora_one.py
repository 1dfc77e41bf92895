"""LoRA-One: A B starts as the best step of rank r down the full gradient, and the base stays (2502.01235).

    −∂L/∂W = U S Vᵀ,   A = U_r √(S_r / (γ S₁)),   B = √(S_r / (γ S₁)) V_rᵀ

So s A B is a step of rate s / (γ S₁): the model starts where that step leads. As in the authors' code the gradient is
divided by its largest singular value; their preconditioner is not published, and not here.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.svd import Factors


def lora_one(g: Array, *, gamma: float, svd: Callable[[Array], Factors]) -> Factors:
    """A `[L, I, r]` and B `[L, r, O]` of a stack of matrices.

    Args:
      g: ∂L/∂W `[L, I, O]`.
      gamma: γ.
      svd: gives U_r √S_r `[L, I, r]` and √S_r V_rᵀ `[L, r, O]` of such a stack.
    """
    a, b = svd(-g)
    first = jnp.linalg.norm(a[:, :, :1], axis=1, keepdims=True)  # √S₁
    size = gamma**0.5 * jnp.where(first > 0, first, 1)
    return a / size, b / size
