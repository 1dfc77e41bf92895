"""What attention and MLP are built from: projections, norms, activations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lorax_ft.models.config import DecoderConfig

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": functools.partial(nn.gelu, approximate=False),
}


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + scale), in float32 (1910.07467)."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` to `[..., D]`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        full = x.astype(jnp.float32)
        full = full * lax.rsqrt(jnp.mean(full**2, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (full * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)
        return full.astype(x.dtype) * scale.astype(x.dtype)


def projections(
    config: DecoderConfig, x: Array, widths: tuple[int, ...], names: tuple[str, ...], fused: str
) -> list[Array]:
    """Projections of x, by one matrix each or by one for all."""
    if not config.fused:
        return [dense(config, width, name)(x) for width, name in zip(widths, names, strict=True)]
    return jnp.split(dense(config, sum(widths), fused)(x), np.cumsum(widths)[:-1], axis=-1)


def dense(config: DecoderConfig, features: int, name: str) -> nn.Dense:
    """The projection of that name."""
    bias = name in config.biases
    return nn.Dense(
        features, use_bias=bias, dtype=config.dtype, dot_general=rows_dot_general, name=name
    )


def norm(config: DecoderConfig, name: str) -> RMSNorm:
    """The norm of that name."""
    return RMSNorm(config.norm_eps, config.norm_offset, name=name)


def rows_dot_general(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`lax.dot_general` of `[..., I]` and `[I, O]` with the leading axes as rows of one matrix: faster on CPUs."""
    rows = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def softcap(x: Array, cap: float | None) -> Array:
    """c · tanh(x / c); x itself where c is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)
