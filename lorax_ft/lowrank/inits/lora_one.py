"""LoRA-One (2502.01235): A B starts as the best step of rank r down the full gradient.

    −∂L/∂W = U S Vᵀ,   A = U_r √(S_r / (γ S₁)),   B = √(S_r / (γ S₁)) V_rᵀ

The base stays. s A B is a gradient step of rate s / (γ S₁): the model starts where that step leads.
As in the authors' code the gradient is divided by its largest singular value. Their preconditioner
is not published, and not implemented here.
"""

from __future__ import annotations

import jax.numpy as jnp

from lorax_ft.lowrank.inits.context import InitContext, InitResult
from lorax_ft.lowrank.inits.svd import nonzero


def lora_one(context: InitContext) -> InitResult:
    """A and B from the largest singular values of the negative gradient."""
    gamma = context.options["lora_one_gamma"]
    a, b = context.svd(-context.measured)
    first_root = jnp.linalg.norm(a[:, :, :1], axis=1, keepdims=True)  # √S₁
    size = gamma**0.5 * nonzero(first_root)
    return InitResult((a / size, b / size))
