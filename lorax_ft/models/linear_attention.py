"""Gated linear attention: a state of fixed size in place of a cache that grows with the text.

Shapes: B batch, T tokens, D width, H value heads, K key heads, Cₖ and Cᵥ their channels, W width of
the convolution, M = 2 K Cₖ + H Cᵥ channels that it mixes along the text.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.constraints import keep_tokens_split, split_heads
from lorax_ft.models.config import DecoderConfig, LinearAttention
from lorax_ft.models.delta_rule import gated_delta_rule
from lorax_ft.models.parts import ACTIVATIONS, RMSNorm, dense

State = dict[str, Array]
"""`recurrent` `[B, H, Cₖ, Cᵥ]` in float32, and `inputs` `[B, W − 1, M]`, the convolution's last."""
NORM_EPS = 1e-6


class Rows(NamedTuple):
    """Where the texts of a batch's rows start and end."""

    # [B, T], numbers the texts of a row from 0; None: each row is one text.
    runs: Array | None
    # [B], the tokens of a row before its padding; None: all.
    counts: Array | None


def make_rows(segment_ids: Array | None, counts: Array | None) -> Rows:
    """The texts of rows `[B, T]`: a new one starts wherever the segment's id changes."""
    if segment_ids is None:
        return Rows(None, counts)
    ids_before = segment_ids[:, :-1]
    changes = segment_ids[:, 1:] != ids_before  # [B, T - 1]
    later = jnp.cumsum(changes, axis=1, dtype=jnp.int32)
    # The first token has none before it, and belongs to text 0.
    first = (1, 0)
    runs = jnp.pad(later, ((0, 0), first))
    return Rows(runs, counts)


def empty_state(config: DecoderConfig, linear: LinearAttention, batch: int) -> State:
    """The state before the first token."""
    recurrent = (batch, linear.value_heads, linear.key_dim, linear.value_dim)
    inputs = (batch, linear.conv_width - 1, linear.mixed)
    return {
        "recurrent": jnp.zeros(recurrent, jnp.float32),
        "inputs": jnp.zeros(inputs, config.dtype),
    }


class GatedDeltaNet(nn.Module):
    """Linear attention by the gated delta rule (2412.06464)."""

    config: DecoderConfig
    linear: LinearAttention

    @nn.compact
    def __call__(self, x: Array, rows: Rows, state: State | None) -> tuple[Array, State | None]:
        """`[B, T, D]` to `[B, T, D]`, and the state after the last token before padding.

        Args:
          x: `[B, T, D]`.
          rows: where texts start and end.
          state: before the first token; None: there is none, and none is returned.
        """
        c = self.config
        linear = self.linear
        heads = linear.value_heads
        mixed = dense(c, linear.mixed, "in_proj_qkv")(x)
        z = dense(c, heads * linear.value_dim, "in_proj_z")(x)
        b = dense(c, heads, "in_proj_b")(x)
        a = dense(c, heads, "in_proj_a")(x)

        before = state or empty_state(c, linear, len(x))
        # A start that all rows share has a state of one row.
        before = {
            name: jnp.broadcast_to(leaf, (len(x), *leaf.shape[1:])) for name, leaf in before.items()
        }
        conv = CausalConv(linear.conv_width, name="conv1d")
        # Where tokens are split over devices, only those at the borders are exchanged here.
        mixed = keep_tokens_split(mixed)
        convolved = keep_tokens_split(conv(mixed, before["inputs"], rows.runs))
        q, k, v = self._heads(ACTIVATIONS[c.activation](convolved))

        rate = self.param("A_log", nn.initializers.zeros, (heads,))
        bias = self.param("dt_bias", nn.initializers.ones, (heads,))
        log_decay = _log_decay(a, rate, bias)
        beta = jax.nn.sigmoid(b).astype(jnp.float32)
        if rows.counts is not None:
            # A token with ln α = 0 and β = 0 leaves the state as it is.
            log_decay = _zero_padding(log_decay, rows.counts)
            beta = _zero_padding(beta, rows.counts)
        # The rule goes along the text, so that heads are split in place of tokens.
        y, recurrent = gated_delta_rule(
            split_heads(q),
            split_heads(k),
            split_heads(v),
            log_decay=split_heads(log_decay),
            beta=split_heads(beta),
            state=before["recurrent"],
            runs=rows.runs,
        )
        y = keep_tokens_split(y)

        norm = RMSNorm(c.norm_eps, name="norm")
        y = _gated(norm(y.astype(x.dtype)), z)
        y = dense(c, c.width, "out_proj")(keep_tokens_split(y))
        if state is None:
            return y, None
        inputs = _last_inputs(before["inputs"], mixed, rows.counts)
        return y, {"recurrent": recurrent, "inputs": inputs}

    def _heads(self, mixed: Array) -> tuple[Array, Array, Array]:
        """Queries, keys `[B, T, H, Cₖ]` and values `[B, T, H, Cᵥ]` of channels `[B, T, M]`."""
        linear = self.linear
        keys = linear.key_heads * linear.key_dim
        q, k, v = jnp.split(mixed, [keys, 2 * keys], axis=-1)
        scale = linear.key_dim**-0.5
        q = _unit(_split_heads(q, linear.key_dim)) * scale
        k = _unit(_split_heads(k, linear.key_dim))
        v = _split_heads(v, linear.value_dim)
        # A key head serves successive value heads.
        groups = linear.value_heads // linear.key_heads
        q = jnp.repeat(q, groups, axis=2)
        k = jnp.repeat(k, groups, axis=2)
        return q, k, v


class CausalConv(nn.Module):
    """A convolution along the text, of each channel by itself."""

    width: int

    @nn.compact
    def __call__(self, x: Array, before: Array, runs: Array | None) -> Array:
        """`[B, T, M]` to `[B, T, M]`; a text does not see the one before it.

        Args:
          x: `[B, T, M]`.
          before: `[B, W − 1, M]`, the inputs that precede the first token.
          runs: as in `Rows`.
        """
        tokens, channels = x.shape[1:]
        # The shape of nn.Conv's kernel, which torch has in the opposite order.
        shape = (self.width, 1, channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        padded = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        y = jnp.zeros_like(x)
        for tap in range(self.width):
            # The last tap reads the token itself, and the one before it the token before.
            back = self.width - 1 - tap
            part = padded[:, tap : tap + tokens]
            if runs is not None and back:
                # What precedes the row counts as its first text's.
                earlier = jnp.pad(runs, ((0, 0), (back, 0)))[:, :tokens]
                same_text = (runs == earlier)[..., None]
                part = jnp.where(same_text, part, 0)
            weights = kernel[tap, 0].astype(x.dtype)
            y = y + part * weights
        return y


def _log_decay(a: Array, rate: Array, bias: Array) -> Array:
    """ln α = −exp(rate) · softplus(a + bias), `[B, T, H]` in float32."""
    step = jax.nn.softplus(a.astype(jnp.float32) + bias)
    speed = jnp.exp(rate.astype(jnp.float32))
    return -speed * step


def _zero_padding(x: Array, counts: Array) -> Array:
    """`[B, T, H]` with zeros at the tokens of a row after its first `counts` ones."""
    tokens = x.shape[1]
    is_text = jnp.arange(tokens) < counts[:, None]
    return jnp.where(is_text[..., None], x, 0)


def _gated(y: Array, z: Array) -> Array:
    """y · silu(z), in the shape `[B, T, H · Cᵥ]` of z; y is `[B, T, H, Cᵥ]`."""
    gate = jax.nn.silu(z.astype(jnp.float32))
    # The product is in float32, as the gate is.
    product = y * gate.reshape(y.shape)
    return product.astype(y.dtype).reshape(z.shape)


def _split_heads(x: Array, channels: int) -> Array:
    """`[B, T, heads · channels]` to `[B, T, heads, channels]`."""
    batch, tokens, _ = x.shape
    return x.reshape(batch, tokens, -1, channels)


def _last_inputs(before: Array, x: Array, counts: Array | None) -> Array:
    """The last W − 1 inputs `[B, W − 1, M]` before the padding, for the next tokens."""
    width = before.shape[1]
    inputs = jnp.concatenate([before, x.astype(before.dtype)], axis=1)
    if counts is None:
        # From the front: with a width of 0, a slice from -0 would be all of them.
        first = inputs.shape[1] - width
        return inputs[:, first:]
    # `inputs` starts W − 1 tokens before x, so the last ones before the padding start at `counts`.
    places = counts[:, None] + jnp.arange(width)
    return jnp.take_along_axis(inputs, places[..., None], axis=1)


def _unit(x: Array) -> Array:
    """x / |x| over the last axis, in float32."""
    full = x.astype(jnp.float32)
    square = jnp.sum(full**2, axis=-1, keepdims=True)
    return full * lax.rsqrt(square + NORM_EPS)
