"""Measuring the inputs of layers inside scans, recomputation and shards, where Python cannot reach.

A leaf `input_probe` of zeros is added beside the kernel, and the input x passes it unchanged. The
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
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense):
            return next_fun(*args, **kwargs)
        layer = module.variables.get("params", {})
        if PROBE not in layer:
            return next_fun(*args, **kwargs)
        x, *rest = args or (kwargs["inputs"],)
        x = pass_by(x, layer[PROBE], layer[WEIGHTS])
        return next_fun(x, *rest)

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
    width = x.shape[-1]
    if x.size != weights.size * width:
        raise ValueError(
            f"there are weights for {weights.size} tokens, but a layer's input is {x.shape}"
        )
    return x


def _forward(x: Array, probe: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    residuals = (x, weights)
    return pass_by(x, probe, weights), residuals


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, weights = residuals
    width = x.shape[-1]
    rows = x.reshape(-1, width).astype(jnp.float32)
    # A column of ones, so that the product holds Σ x and the count beside Σ xᵀ x.
    ones = jnp.ones((len(rows), 1))
    rows = jnp.concatenate([rows, ones], axis=1)  # [N, I + 1]
    weighted = weights.reshape(-1, 1) * rows
    highest = lax.Precision.HIGHEST
    moments = jnp.einsum("ni,nj->ij", weighted, rows, precision=highest)
    # x keeps its own gradient g: the probe only listens.
    return g, moments, jnp.zeros_like(weights)


pass_by.defvjp(_forward, _backward)


def second_moments(moments: np.ndarray, *, centered: bool) -> np.ndarray:
    """Σ xᵀ x / N `[*L, I, I]` of a probe's moments, float32.

    Args:
      moments: `[*L, I + 1, I + 1]`.
      centered: the covariance Σ (x − x̄)ᵀ (x − x̄) / N in its place.
    """
    *stack, size, _ = moments.shape
    matrices = moments.reshape(-1, size, size)
    # One matrix at a time: the whole stack might not fit into memory in float64.
    parts = [_second_moment(matrix, centered=centered) for matrix in matrices]
    inputs = size - 1
    return np.stack(parts).reshape(*stack, inputs, inputs)


def _second_moment(matrix: np.ndarray, *, centered: bool) -> np.ndarray:
    """The same of one matrix, whose last element is the number of tokens N."""
    count = matrix[-1, -1]
    mean = matrix.astype(np.float64) / count
    second = mean[:-1, :-1]
    first = mean[:-1, -1]
    if centered:
        second = second - np.outer(first, first)
    return second.astype(np.float32)
