"""The MLP of a layer, dense or sparse.

Shapes: B batch, T tokens, D width, F mlp width, E experts, N rows, K experts of a row, G groups of
rows, S shards, M sorted copies of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.lowrank.experts import ExpertDense, ExpertProduct, Rows
from lorax_ft.mesh_axes import expert_devices
from lorax_ft.models import grouped
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.parts import dense, hidden_activations, projections

ROUTER = "router"
"""The collection of what `router_loss` needs, which `MoE` writes where it is mutable."""


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

    Tokens are sorted by expert, so that only chosen experts compute. With `expert_products` "dense"
    every expert computes every token, and has the weight 0 where it was not chosen: the reference.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array, counted: Array | None = None) -> Array:
        """`[B, T, D]` to `[B, T, D]`.

        Args:
          x: `[B, T, D]`.
          counted: `[B, T]`, the tokens that the load-balancing loss counts; None: it is not needed.
        """
        c = self.config
        experts = c.experts
        assert experts is not None
        scores = dense(c, experts.count, "gate")(x)
        scores = scores.astype(jnp.float32)
        p = jax.nn.softmax(scores)
        weights, chosen = lax.top_k(p, experts.top_k)  # [B, T, K]
        if counted is not None:
            self._sow_usage(p, chosen, counted)
        if experts.renormalized:
            total = jnp.sum(weights, axis=-1, keepdims=True)
            weights = weights / total
        kind = grouped.product_kind(c)
        if kind == "dense":
            y = self._all_experts(*[_flat(part) for part in (x, weights, chosen)])
            return y.reshape(x.shape)
        return self._chosen_experts(x, weights, chosen, kind)

    def _sow_usage(self, p: Array, chosen: Array, counted: Array) -> None:
        """Store sums over the counted tokens `[B, T]`: see `Usage`."""
        real = counted.astype(p.dtype)
        by_copy = jnp.repeat(real.reshape(-1), chosen.shape[-1])
        usage = Usage(
            tokens=jnp.sum(real)[None],
            chosen=jnp.bincount(chosen.reshape(-1), weights=by_copy, length=p.shape[-1]),
            probability=jnp.einsum("bt,bte->e", real, p),
        )
        self.sow(ROUTER, "usage", usage)

    def _all_experts(self, x: Array, weights: Array, chosen: Array) -> Array:
        """Every expert on every row `[N, D]`."""
        experts = self.config.experts
        assert experts is not None
        row_index = jnp.arange(len(x))[:, None]
        all_weights = jnp.zeros((len(x), experts.count), weights.dtype)  # [N, E]
        all_weights = all_weights.at[row_index, chosen].set(weights)
        copies = jnp.broadcast_to(x, (experts.count, *x.shape))
        y = AllExperts(self.config, name="experts")(copies)  # [E, N, D]
        return jnp.einsum("end,ne->nd", y, all_weights.astype(y.dtype))

    def _chosen_experts(self, x: Array, weights: Array, chosen: Array, kind: str) -> Array:
        """The chosen experts on copies of each token `[B, T, D]`, sorted on each shard."""
        experts = self.config.experts
        assert experts is not None
        shards = grouped.shards_of(*x.shape[:2])
        x, weights, chosen = [grouped.by_shard(part, shards) for part in (x, weights, chosen)]
        copies = chosen.shape[1] * experts.top_k
        block = grouped.block_rows(copies, experts.count, kind)
        parts = expert_devices()
        grouped.check_expert_axis(self.config, parts, source="the model")
        routed = grouped.route(chosen, experts=experts.count, block=block, parts=parts)
        product = grouped.product_of(kind, block=block)
        mlp = ChosenExperts(self.config, product, name="experts")
        y = mlp(grouped.gather_tokens(x, routed), routed.rows)  # [S, M, D]
        return grouped.from_shards(grouped.combine_rows(y, weights, routed), shards)


class Usage(NamedTuple):
    """How much each expert is used, summed over tokens."""

    tokens: Array
    """Their number, `[1]`."""
    chosen: Array
    """The tokens that chose each expert, `[E]`."""
    probability: Array
    """The router's probability of each expert, `[E]`."""


def router_loss(usages: Sequence[Usage]) -> Array:
    """E · Σ_e f_e P_e, with f the share of tokens that chose e and P its mean probability.

    Switch Transformers' load-balancing loss (2101.03961), over the tokens of all layers together as
    in transformers' `load_balancing_loss_func`. It is top_k where all experts are used alike.

    Args:
      usages: of each layer, or of a stack of layers, with leading axes.
    """
    add = functools.partial(jax.tree.map, jnp.add)
    tokens, chosen, probability = functools.reduce(add, map(_over_layers, usages))
    tokens = jnp.maximum(tokens, 1)
    return len(chosen) * jnp.sum((chosen / tokens) * (probability / tokens))


def _over_layers(usage: Usage) -> Usage:
    """The sum over all axes but the last."""
    return jax.tree.map(lambda leaf: jnp.sum(leaf.reshape(-1, leaf.shape[-1]), axis=0), usage)


class ChosenExperts(nn.Module):
    """The MLPs of all experts, each on its own rows."""

    config: DecoderConfig
    product: ExpertProduct

    @nn.compact
    def __call__(self, x: Array, rows: Rows) -> Array:
        """`[S, M, D]` to `[S, M, D]`."""
        c = self.config
        assert c.experts is not None
        count = c.experts.count

        def projection(features: int, name: str) -> ExpertDense:
            return ExpertDense(
                experts=count,
                features=features,
                product=self.product,
                use_bias=name in c.biases,
                dtype=c.dtype,
                name=name,
            )

        gate = projection(c.mlp_width, "gate_proj")(x, rows)
        up = projection(c.mlp_width, "up_proj")(x, rows)
        hidden = hidden_activations(c, gate, up)
        return projection(c.width, "down_proj")(hidden, rows)


class AllExperts(nn.Module):
    """The MLPs of all experts side by side, each on all rows."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[E, N, D]` to `[E, N, D]`."""
        c = self.config
        gate = _expert_projection(c, x, c.mlp_width, "gate_proj")
        up = _expert_projection(c, x, c.mlp_width, "up_proj")
        hidden = hidden_activations(c, gate, up)
        return _expert_projection(c, hidden, c.width, "down_proj")


def _flat(x: Array) -> Array:
    """`[B, T, ...]` as rows `[N, ...]`."""
    return x.reshape(-1, x.shape[-1])


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
