"""Measuring what a layer is given, inside scans, recomputation and shards, where Python cannot reach.

A leaf `input_probe` of zeros stands beside the kernel, and the input x passes by it unchanged. The derivative of
anything with respect to the probe is, by decree, Σ w [x, 1]ᵀ [x, 1] over the tokens: their second moments, their sum
and their count. Letters: N tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

PROBE, WEIGHTS = "input_probe", "input_weights"


def observed(apply: Callable[..., Any]) -> Callable[..., Any]:
    """A function like `apply` whose Dense layers heed `input_probe` `[*L, I + 1, I + 1]` and `input_weights` `[*L, N]`.

    Args:
      apply: `model.apply` of a linen model, or any function that calls it.
    """

    def intercept(
        next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name != "__call__" or not isinstance(context.module, nn.Dense):
            return next_fun(*args, **kwargs)
        layer = context.module.variables.get("params", {})
        if PROBE not in layer:
            return next_fun(*args, **kwargs)
        x, *rest = args or (kwargs["inputs"],)
        return next_fun(pass_by(x, layer[PROBE], layer[WEIGHTS]), *rest)

    def run(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(intercept):
            return apply(*args, **kwargs)

    return run


@jax.custom_vjp
def pass_by(x: Array, probe: Array, weights: Array) -> Array:
    """x `[..., I]`, unchanged; `probe` `[I + 1, I + 1]` has the moments of its tokens, weighed by `weights` `[N]`."""
    if x.size != weights.size * x.shape[-1]:
        raise ValueError(
            f"{weights.size} tokens are weighed, but a layer's input {x.shape} is not of as many"
        )
    return x


def _forward(x: Array, probe: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return pass_by(x, probe, weights), (x, weights)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, weights = residuals
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    rows = jnp.concatenate([rows, jnp.ones((len(rows), 1))], axis=1)  # [N, I + 1]
    moments = jnp.einsum(
        "ni,nj->ij", weights.reshape(-1, 1) * rows, rows, precision=lax.Precision.HIGHEST
    )
    return g, moments, jnp.zeros_like(weights)


pass_by.defvjp(_forward, _backward)


def second_moments(moments: np.ndarray, *, centered: bool) -> np.ndarray:
    """Σ xᵀ x / N `[*L, I, I]` of a probe's moments, or the covariance Σ (x − x̄)ᵀ (x − x̄) / N; float32."""

    def one(
        matrix: np.ndarray,
    ) -> np.ndarray:  # in float64, which the whole stack might not fit into
        wide = matrix.astype(np.float64) / matrix[-1, -1]
        second, mean = wide[:-1, :-1], wide[:-1, -1]
        return (second - np.outer(mean, mean) if centered else second).astype(np.float32)

    stack = moments.reshape(-1, *moments.shape[-2:])
    return np.stack([one(matrix) for matrix in stack]).reshape(
        *moments.shape[:-2], *[len(stack[0]) - 1] * 2
    )
