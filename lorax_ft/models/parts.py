"""Parts of attention and MLP: projections, norms, activations.

Shapes: B batch, T tokens, D width, F mlp width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from lorax_ft.mesh_axes import token_devices
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
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,))
        full = normalized(x.astype(jnp.float32), self.eps)
        # As in transformers: Gemma multiplies in float32, the others in the activations' dtype.
        if self.offset:
            scale = scale.astype(jnp.float32)
            y = full * (self.offset + scale)
            return y.astype(x.dtype)
        return full.astype(x.dtype) * scale.astype(x.dtype)


def normalized(x: Array, eps: float) -> Array:
    """x / rms(x) over the last axis, computed in float32."""
    full = x.astype(jnp.float32)
    mean_square = jnp.mean(full**2, axis=-1, keepdims=True)
    full = full * lax.rsqrt(mean_square + eps)
    return full.astype(x.dtype)


def projections(
    config: DecoderConfig,
    x: Array,
    widths: Mapping[str, int],
    *,
    fused: str,
) -> list[Array]:
    """Projections of x to several widths, by one matrix each or by one for all.

    Args:
      config: `config.fused` chooses.
      x: `[B, T, D]`.
      widths: the width of each projection, by name.
      fused: the name of the one matrix.
    """
    if config.fused:
        sizes = list(widths.values())
        y = dense(config, sum(sizes), fused)(x)
        borders = np.cumsum(sizes)[:-1]
        return jnp.split(y, borders, axis=-1)
    return [dense(config, width, name)(x) for name, width in widths.items()]


def dense(config: DecoderConfig, features: int, name: str) -> nn.Dense:
    """The projection `name` to so many features."""
    return nn.Dense(
        features,
        use_bias=name in config.biases,
        dtype=config.dtype,
        dot_general=rows_dot_general,
        name=name,
    )


def hidden_activations(config: DecoderConfig, gate: Array, up: Array) -> Array:
    """What an MLP projects down, `[..., F]`, from its gate and up `[..., F]` (2002.05202)."""
    # The name that policies of rematerialization save.
    gate = checkpoint_name(gate, "mlp")
    up = checkpoint_name(up, "mlp")
    clamped = config.clamped_gate
    if clamped is None:
        activation = ACTIVATIONS[config.activation]
        return activation(gate) * up
    gate = jnp.minimum(gate, clamped.limit)
    up = jnp.clip(up, -clamped.limit, clamped.limit)
    return (up + 1) * gate * jax.nn.sigmoid(clamped.alpha * gate)


def norm(config: DecoderConfig, name: str) -> RMSNorm:
    """The norm `name`."""
    return RMSNorm(config.norm_eps, config.norm_offset, name=name)


def rows_dot_general(
    x: Array,
    kernel: Array,
    dimension_numbers: Any,
    **options: Any,
) -> Array:
    """`lax.dot_general` of `[..., I]` and `[I, O]`, with the leading axes as one axis of rows.

    This is faster on CPUs than a product with several leading axes.
    """
    if token_devices() > 1:
        # One axis cannot be split over the devices of rows and over those of tokens.
        last = (x.ndim - 1,)
        return lax.dot_general(x, kernel, ((last, (0,)), ((), ())), **options)
    *leading, features = x.shape
    rows = x.reshape(-1, features)
    if x.dtype == kernel.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        y = _bfloat16_product(rows, kernel)
    else:
        contracting = ((1,), (0,))
        batch = ((), ())
        y = lax.dot_general(rows, kernel, (contracting, batch), **options)
    return y.reshape(*leading, kernel.shape[-1])


@jax.custom_vjp
def _bfloat16_product(x: Array, kernel: Array) -> Array:
    """x W by a product with a float32 result, which XLA computes with a CPU's bfloat16 units.

    With a bfloat16 result it converts both to float32 first: a fifth of the speed with AMX (jaxlib
    0.10.2).
    """
    y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _bfloat16_forward(x: Any, kernel: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
    # What a frozen kernel, or an input without a gradient, does not need: a product that is dropped
    # later would count in the estimates of plans.
    for_kernel = x.value if kernel.perturbed else None
    for_x = kernel.value if x.perturbed else None
    return _bfloat16_product(x.value, kernel.value), (for_kernel, for_x)


def _bfloat16_backward(
    residuals: tuple[Array | None, Array | None], d_y: Any
) -> tuple[Array | None, Array | None]:
    x, kernel = residuals
    if isinstance(d_y, SymbolicZero):
        return None, None
    d_x = None if kernel is None else _bfloat16_product(d_y, kernel.T)
    d_kernel = None if x is None else _bfloat16_product(x.T, d_y)
    return d_x, d_kernel


_bfloat16_product.defvjp(_bfloat16_forward, _bfloat16_backward, symbolic_zeros=True)


def softcap(x: Array, cap: float | None) -> Array:
    """c · tanh(x / c); x itself where c is None."""
    if cap is None:
        return x
    return cap * jnp.tanh(x / cap)
