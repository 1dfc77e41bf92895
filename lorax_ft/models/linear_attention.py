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
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    later = jnp.cumsum(changes, axis=1, dtype=jnp.int32)
    return Rows(jnp.pad(later, ((0, 0), (1, 0))), counts)


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
        conv = CausalConv(linear.conv_width, name="conv1d")
        convolved = conv(mixed, before["inputs"], rows.runs)
        q, k, v = self._heads(ACTIVATIONS[c.activation](convolved))

        rate = self.param("A_log", nn.initializers.zeros, (heads,))
        bias = self.param("dt_bias", nn.initializers.ones, (heads,))
        step = jax.nn.softplus(a.astype(jnp.float32) + bias)
        log_decay = -jnp.exp(rate.astype(jnp.float32)) * step
        beta = jax.nn.sigmoid(b).astype(jnp.float32)
        if rows.counts is not None:  # padding leaves the state as it is
            is_text = jnp.arange(x.shape[1]) < rows.counts[:, None]
            log_decay = jnp.where(is_text[..., None], log_decay, 0)
            beta = jnp.where(is_text[..., None], beta, 0)
        y, recurrent = gated_delta_rule(
            q,
            k,
            v,
            log_decay=log_decay,
            beta=beta,
            state=before["recurrent"],
            runs=rows.runs,
        )

        y = RMSNorm(c.norm_eps, name="norm")(y.astype(x.dtype))
        gate = jax.nn.silu(z.astype(jnp.float32)).reshape(y.shape)
        y = (y * gate).astype(x.dtype).reshape(z.shape)
        y = dense(c, c.width, "out_proj")(y)
        if state is None:
            return y, None
        inputs = _last_inputs(before["inputs"], mixed, rows.counts)
        return y, {"recurrent": recurrent, "inputs": inputs}

    def _heads(self, mixed: Array) -> tuple[Array, Array, Array]:
        """Queries, keys `[B, T, H, Cₖ]` and values `[B, T, H, Cᵥ]` of channels `[B, T, M]`."""
        linear = self.linear
        keys = linear.key_heads * linear.key_dim
        q, k, v = jnp.split(mixed, [keys, 2 * keys], axis=-1)
        q = _unit(q.reshape(*q.shape[:2], -1, linear.key_dim)) * linear.key_dim**-0.5
        k = _unit(k.reshape(*k.shape[:2], -1, linear.key_dim))
        v = v.reshape(*v.shape[:2], -1, linear.value_dim)
        # A key head serves successive value heads.
        groups = linear.value_heads // linear.key_heads
        q, k = (jnp.repeat(x, groups, axis=2) for x in (q, k))
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
            part = padded[:, tap : tap + tokens]
            back = self.width - 1 - tap
            if runs is not None and back:
                earlier = jnp.pad(runs, ((0, 0), (back, 0)))[:, :tokens]
                part = jnp.where((runs == earlier)[..., None], part, 0)
            y = y + part * kernel[tap, 0].astype(x.dtype)
        return y


def _last_inputs(before: Array, x: Array, counts: Array | None) -> Array:
    """The last W − 1 inputs `[B, W − 1, M]` before the padding, for the next tokens."""
    width = before.shape[1]
    inputs = jnp.concatenate([before, x.astype(before.dtype)], axis=1)
    if counts is None:
        return inputs[:, inputs.shape[1] - width :]
    places = counts[:, None] + jnp.arange(width)
    return jnp.take_along_axis(inputs, places[..., None], axis=1)


def _unit(x: Array) -> Array:
    """x / |x| over the last axis, in float32."""
    full = x.astype(jnp.float32)
    square = jnp.sum(full**2, axis=-1, keepdims=True)
    return full * lax.rsqrt(square + NORM_EPS)
