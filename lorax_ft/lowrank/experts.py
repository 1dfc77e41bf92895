"""A linen layer of several experts, each of which multiplies its own rows.

Shapes: S shards, M rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array


class Rows(NamedTuple):
    """Which expert each row belongs to. Within a shard, rows are sorted by expert."""

    expert: Array
    """Of each row, `[S, M]` int32."""
    sizes: Array
    """The rows of each expert, `[S, E]` int32; they fill the M rows from the first one."""


ExpertProduct = Callable[[Array, Any, Rows], Array]
"""(x `[S, M, I]`, kernels `[E, I, O]`, rows) -> `[S, M, O]`: each row times its expert's kernel."""


class Grouped(NamedTuple):
    """Rows, and how they are multiplied."""

    rows: Rows
    product: ExpertProduct

    def leaf(self, leaf: Array) -> Array:
        """A leaf `[E, ...]` as each row has it, `[S, M, ...]`."""
        return leaf[self.rows.expert]

    def multiply(self, x: Array, kernels: Any) -> Array:
        """Each row times its expert's kernel."""
        return self.product(x, kernels, self.rows)


class ExpertDense(nn.Module):
    """y = x W_e + b_e, with e the expert of each row."""

    experts: int
    features: int
    product: ExpertProduct
    use_bias: bool = True
    dtype: Any = None
    promote_dtype: Any = promote_dtype
    """As linen's own layers have it."""

    @nn.compact
    def __call__(self, x: Array, rows: Rows) -> Array:
        """`[S, M, I]` to `[S, M, O]`."""
        shape = (self.experts, x.shape[-1], self.features)
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        kernel = self.param("kernel", init, shape)
        grouped = Grouped(rows, self.product)
        x, kernel = self.promote_dtype(x, kernel, dtype=self.dtype)
        y = grouped.multiply(x, kernel)
        if not self.use_bias:
            return y
        zeros = nn.initializers.zeros
        bias = self.param("bias", zeros, (self.experts, self.features), jnp.float32)
        return y + grouped.leaf(bias).astype(y.dtype)
