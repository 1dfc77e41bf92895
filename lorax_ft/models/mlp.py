"""The MLP of a layer, dense or sparse.

Shapes: B batch, T tokens, D width, F mlp width, E experts, N rows.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.parts import dense, hidden_activations, projections


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)), or with another product of gate and up (2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        c = self.config
        widths = {"gate_proj": c.mlp_width, "up_proj": c.mlp_width}
        gate, up = projections(c, x, widths, fused="gate_up_proj")
        hidden = hidden_activations(c, gate, up)
        return dense(c, c.width, "down_proj")(hidden)


class MoE(nn.Module):
    """Σ weight · expert(x) over the experts that a router chooses for each token (2101.03961).

    Every expert computes every token, and an expert that was not chosen has the weight 0. This is
    exact, and takes `count / top_k` times the arithmetic of a program that sorts tokens by expert.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        c = self.config
        experts = c.experts
        assert experts is not None
        rows = x.reshape(-1, c.width)

        scores = dense(c, experts.count, "gate")(rows)
        scores = scores.astype(jnp.float32)
        p = jax.nn.softmax(scores)
        weights, chosen = lax.top_k(p, experts.top_k)
        if experts.renormalized:
            total = jnp.sum(weights, axis=-1, keepdims=True)
            weights = weights / total
        row_index = jnp.arange(len(rows))[:, None]
        all_weights = jnp.zeros_like(p)  # [N, E]
        all_weights = all_weights.at[row_index, chosen].set(weights)

        copies = jnp.broadcast_to(rows, (experts.count, *rows.shape))
        y = ExpertMLP(c, name="experts")(copies)  # [E, N, D]
        y = jnp.einsum("end,ne->nd", y, all_weights.astype(y.dtype))
        return y.reshape(x.shape)


class ExpertMLP(nn.Module):
    """The MLPs of all experts side by side."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[E, N, D]` to `[E, N, D]`."""
        c = self.config
        gate = _expert_projection(c, x, c.mlp_width, "gate_proj")
        up = _expert_projection(c, x, c.mlp_width, "up_proj")
        hidden = hidden_activations(c, gate, up)
        return _expert_projection(c, hidden, c.width, "down_proj")


def _expert_projection(config: DecoderConfig, x: Array, features: int, name: str) -> Array:
    """The projection `name` of each expert, `[E, N, in]` to `[E, N, features]`."""
    experts, _, ins = x.shape
    projection = nn.Einsum(
        (experts, ins, features),
        "eni,eio->eno",
        use_bias=name in config.biases,
        dtype=config.dtype,
        name=name,
    )
    return projection(x)
