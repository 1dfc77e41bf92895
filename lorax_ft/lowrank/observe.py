"""Measuring the inputs of layers: their second moments over the tokens of a batch.

Letters: N tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

ROWS = 1024  # of a matrix that are in float64 at once


def with_inputs(
    apply: Callable[..., Any],
    paths: Collection[str],
) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """A function like `apply` that also returns the inputs of some modules by slash path.

    Args:
      apply: `module.apply` of a linen module, or any function that calls it.
      paths: of modules that are not inside a scan.
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Array]]:
        inputs: dict[str, Array] = {}

        def intercept(
            next_fun: Callable[..., Any],
            args: Any,
            kwargs: Any,
            context: nn.module.InterceptorContext,
        ) -> Any:
            path = "/".join(context.module.path)
            if context.method_name == "__call__" and path in paths:
                inputs[path] = args[0] if args else kwargs["inputs"]
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(intercept):
            result = apply(*args, **kwargs)
        return result, inputs

    return run


def moments(x: Array, weights: Array) -> Array:
    """Σ w [x, 1]ᵀ [x, 1] over the tokens, `[I + 1, I + 1]` float32.

    It holds Σ x and the weights' sum beside Σ w xᵀ x.

    Args:
      x: `[..., I]`.
      weights: w `[...]`.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    ones = jnp.ones((len(rows), 1))
    rows = jnp.concatenate([rows, ones], axis=1)  # [N, I + 1]
    weighted = weights.reshape(-1, 1) * rows
    return jnp.einsum("ni,nj->ij", weighted, rows, precision=lax.Precision.HIGHEST)


def second_moments(sums: np.ndarray, *, centered: bool) -> np.ndarray:
    """Σ xᵀ x / N `[I, I]` of what `moments` gives, float32.

    Args:
      sums: `[I + 1, I + 1]`; the last element is N.
      centered: the covariance Σ (x − x̄)ᵀ (x − x̄) / N in its place.
    """
    count = sums[-1, -1]
    mean = sums[-1, :-1].astype(np.float64) / count
    inputs = len(mean)
    result = np.empty((inputs, inputs), np.float32)
    # Centering needs float64, in which the whole matrix would be twice as large.
    for first in range(0, inputs, ROWS):
        rows = slice(first, min(first + ROWS, inputs))
        second = sums[rows, :-1].astype(np.float64) / count
        if centered:
            second -= np.outer(mean[rows], mean)
        result[rows] = second
    return result
