"""The MLP of a layer, dense or sparse.

Shapes: B batch, T tokens, D width, F mlp width, E experts, N rows.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.parts import ACTIVATIONS, dense, projections


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)) (2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        c = self.config
        gate, up = projections(
            c, x, (c.mlp_width, c.mlp_width), ("gate_proj", "up_proj"), "gate_up_proj"
        )
        gate, up = checkpoint_name(gate, "mlp"), checkpoint_name(up, "mlp")
        return dense(c, c.width, "down_proj")(ACTIVATIONS[c.activation](gate) * up)


class MoE(nn.Module):
    """Σ weight · expert(x) over the experts that a router chooses for each token (2101.03961).

    Every expert computes every token, and what was not chosen weighs 0: exact, and `count / chosen` times the
    arithmetic of a program that sorts tokens by expert.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        c, e = self.config, self.config.experts
        assert e is not None
        rows = x.reshape(-1, c.width)
        p = jax.nn.softmax(dense(c, e.count, "gate")(rows).astype(jnp.float32))
        weights, chosen = lax.top_k(p, e.top_k)
        if e.renormalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        share = jnp.zeros_like(p).at[jnp.arange(len(rows))[:, None], chosen].set(weights)  # [N, E]
        y = ExpertMLP(c, name="experts")(
            jnp.broadcast_to(rows, (e.count, *rows.shape))
        )  # [E, N, D]
        return jnp.einsum("end,ne->nd", y, share.astype(y.dtype)).reshape(x.shape)


class ExpertMLP(nn.Module):
    """The MLPs of all experts side by side."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[E, N, D]` to `[E, N, D]`."""
        c = self.config

        def expert(features: int, name: str) -> nn.Einsum:
            shape = (len(x), c.width if name != "down_proj" else c.mlp_width, features)
            return nn.Einsum(shape, "eni,eio->eno", use_bias=False, dtype=c.dtype, name=name)

        gate, up = expert(c.mlp_width, "gate_proj")(x), expert(c.mlp_width, "up_proj")(x)
        gate, up = checkpoint_name(gate, "mlp"), checkpoint_name(up, "mlp")
        return expert(c.width, "down_proj")(ACTIVATIONS[c.activation](gate) * up)
