"""Measuring the inputs of layers inside scans, recomputation and shards, where Python cannot reach.

A leaf `input_probe` of zeros stands beside the kernel, and the input x passes it unchanged. The
derivative of anything with respect to the probe is defined as Σ w [x, 1]ᵀ [x, 1] over the tokens:
their second moments, their sum and their count. Letters: N tokens, I inputs.
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
    """A function like `apply` whose Dense layers have their inputs measured.

    Args:
      apply: `model.apply` of a linen model, or any function that calls it. Its parameters hold
        `input_probe` `[*L, I + 1, I + 1]` and `input_weights` `[*L, N]` beside the kernels of the
        layers to measure.
    """

    def intercept(
        next_fun: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
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
    """x `[..., I]`, unchanged; `probe` `[I + 1, I + 1]` gets the moments of x as its gradient.

    Args:
      x: the input of a layer.
      probe: anything of its shape.
      weights: `[N]`, of the tokens.

    Raises:
      ValueError: x does not have as many tokens as there are weights.
    """
    if x.size != weights.size * x.shape[-1]:
        raise ValueError(
            f"there are weights for {weights.size} tokens, but a layer's input is {x.shape}"
        )
    return x


def _forward(x: Array, probe: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return pass_by(x, probe, weights), (x, weights)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, weights = residuals
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    rows = jnp.concatenate([rows, jnp.ones((len(rows), 1))], axis=1)  # [N, I + 1]
    weighted = weights.reshape(-1, 1) * rows
    moments = jnp.einsum("ni,nj->ij", weighted, rows, precision=lax.Precision.HIGHEST)
    return g, moments, jnp.zeros_like(weights)


pass_by.defvjp(_forward, _backward)


def second_moments(moments: np.ndarray, *, centered: bool) -> np.ndarray:
    """Σ xᵀ x / N `[*L, I, I]` of a probe's moments, float32.

    Args:
      moments: `[*L, I + 1, I + 1]`.
      centered: the covariance Σ (x − x̄)ᵀ (x − x̄) / N in its place.
    """
    stack = moments.reshape(-1, *moments.shape[-2:])
    # A matrix at a time: the whole stack might not fit into memory in float64.
    parts = [_second_moment(matrix, centered=centered) for matrix in stack]
    inputs = moments.shape[-1] - 1
    return np.stack(parts).reshape(*moments.shape[:-2], inputs, inputs)


def _second_moment(matrix: np.ndarray, *, centered: bool) -> np.ndarray:
    """The same of one matrix, whose last element is the number of tokens N."""
    mean = matrix.astype(np.float64) / matrix[-1, -1]
    second, first = mean[:-1, :-1], mean[:-1, -1]
    if centered:
        second = second - np.outer(first, first)
    return second.astype(np.float32)
