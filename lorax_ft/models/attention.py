"""Causal attention, its mask and its cache.

Shapes: B batch, T tokens, S slots of the cache, D width, H heads, K key/value heads,
G = H / K queries for each key, C channels of a head, L layers, N distinct layer types.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lorax_ft.models import layer_cache
from lorax_ft.models.attend import attend, needs_no_mask
from lorax_ft.models.attend_in_blocks import causal
from lorax_ft.models.config import DecoderConfig, Heads, LayerType
from lorax_ft.models.parts import dense, norm, normalized, projections
from lorax_ft.models.rope import rotary, rotate
from lorax_ft.soft_prompts.door import VirtualTokens

KeysAndValues = dict[str, Array]


class RopeAndMask(NamedTuple):
    """What all layers of a type share, stacked over the N distinct layer types.

    Where attention needs no mask, the segments and the layer's type say what a token sees.
    """

    # [N, B, T, 1, C/2]; 1 where a layer does not encode positions
    cos: Array
    # [N, B, T, 1, C/2]; 0 there
    sin: Array
    # [N, B, 1, T, S], or [1, ...] where all layer types have the same; None: causal
    mask: Array | None
    # [1, B, T], of all types; None: one segment for each row
    segment_ids: Array | None
    # [N]: its number
    layer_type: Array


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (2305.13245)."""

    config: DecoderConfig
    # Of this layer.
    heads: Heads

    @nn.compact
    def __call__(
        self,
        x: Array,
        rope_and_mask: RopeAndMask,
        positions: Array,
        virtual: Array,
        layer: Array,
        cache: KeysAndValues | None,
    ) -> tuple[Array, KeysAndValues | None]:
        """`[B, T, D]` to `[B, T, D]`, and the cache with the new keys and values.

        Args:
          x: `[B, T, D]`.
          rope_and_mask: of this layer's type, without the axis N.
          positions: `[B, T]`.
          virtual: `[B, T]`, the numbers of virtual tokens; below 0 at all other tokens.
          layer: the number of this layer in the cache.
          cache: keys and values of all layers, `[L, B, K, S, C]`; see `layer_cache`.
        """
        c = self.config
        cos, sin, mask, segment_ids, layer_type = rope_and_mask
        dim = self.heads.dim
        q, k, v, gate = self._projected(x)

        # A table of several types has the pairs of the widest heads.
        cos = cos[..., : dim // 2]
        sin = sin[..., : dim // 2]
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        k, v = VirtualTokens(name="prefix")(virtual, k, v)
        # The names that policies of rematerialization save.
        q = checkpoint_name(q, "qkv")
        k = checkpoint_name(k, "qkv")
        v = checkpoint_name(v, "qkv")
        if cache is not None:
            new = {"k": k, "v": v}
            own, cache = layer_cache.with_tokens(cache, new, layer, positions)
            k = own["k"].swapaxes(1, 2)
            v = own["v"].swapaxes(1, 2)
        sinks = None
        if c.sinks:
            sinks = self.param("sinks", nn.initializers.zeros, (c.heads,))
        y = attend(c, q, k, v, mask, segment_ids=segment_ids, layer_type=layer_type, sinks=sinks)
        if gate is not None:
            y = y * jax.nn.sigmoid(gate)
        y = y.reshape(*x.shape[:2], c.heads * dim)
        return dense(c, c.width, "o_proj")(y), cache

    def _projected(self, x: Array) -> tuple[Array, Array, Array, Array | None]:
        """Queries, keys and values `[B, T, heads, C]` before rotation, and the output's gate."""
        c = self.config
        dim = self.heads.dim
        q_width = c.heads * dim
        kv_width = self.heads.count * dim
        with_gate = 2 * q_width if c.attention_gate else q_width
        widths = {"q_proj": with_gate, "k_proj": kv_width, "v_proj": kv_width}
        if self.heads.keys_are_values:
            del widths["v_proj"]
        q, k, *values = projections(c, x, widths, fused="qkv_proj")
        v = values[0] if values else k

        gate = None
        if c.attention_gate:
            # Each head's queries and its gate stand beside one another.
            q, gate = jnp.split(_split_heads(q, 2 * dim), 2, axis=-1)
            q = q.reshape(*x.shape[:2], q_width)
        if c.qk_norm == "whole":
            q = norm(c, "q_norm")(q)
            k = norm(c, "k_norm")(k)
        q = _split_heads(q, dim)
        k = _split_heads(k, dim)
        v = _split_heads(v, dim)
        if c.qk_norm == "head":
            q = norm(c, "q_norm")(q)
            k = norm(c, "k_norm")(k)
        if c.value_norm:
            v = normalized(v, c.norm_eps)
        return q, k, v, gate


def _split_heads(x: Array, head_dim: int) -> Array:
    """`[B, T, H C]` to `[B, T, H, C]`."""
    *leading, width = x.shape
    return x.reshape(*leading, width // head_dim, head_dim)


def make_rope_and_mask(
    config: DecoderConfig,
    positions: Array,
    segment_ids: Array | None,
    *,
    slots: int | None,
    length: Array | None,
) -> tuple[RopeAndMask, Array]:
    """What the layers of each type share, and each layer's type `[L]`, an index into the axis N.

    Args:
      config: the decoder's.
      positions: `[B, T]`; with a cache, the slots of the tokens.
      segment_ids: `[B, T]`; a token sees its own segment only. None: one segment for each row.
      slots: the number of slots of the cache; None: no cache.
      length: `[B]`, the length that each text may grow to; None: its present length.
    """
    distinct = config.attention_types
    cos, sin = _rope_by_type(distinct, positions, length)
    mask = None
    if not needs_no_mask(config, tokens=positions.shape[1], cached=slots is not None):
        mask = _mask_by_type(distinct, positions, segment_ids, slots)
    if segment_ids is not None:
        segment_ids = segment_ids[None]
    indices = []
    for layer_type in config.each_layer:
        # Linear attention reads neither, so its index has no meaning.
        indices.append(0 if layer_type.linear else distinct.index(layer_type))
    numbers = jnp.arange(len(distinct))
    return RopeAndMask(cos, sin, mask, segment_ids, numbers), jnp.array(indices)


def _rope_by_type(
    layer_types: tuple[LayerType, ...],
    positions: Array,
    length: Array | None,
) -> tuple[Array, Array]:
    """Cosines and sines `[N, B, T, 1, C/2]`."""
    ropes = [layer_type.rope for layer_type in layer_types]
    pairs = max([rope.dims // 2 for rope in ropes if rope], default=1)
    still = (*positions.shape, 1)
    cosines = []
    sines = []
    for rope in ropes:
        own_pairs = 0
        parts_cos, parts_sin = [], []
        if rope:
            cos, sin = rotary(rope, positions, length=length)
            parts_cos.append(cos)
            parts_sin.append(sin)
            own_pairs = rope.dims // 2
        # A rotation by 0, of all pairs in a layer that does not encode positions.
        parts_cos.append(jnp.ones((*still, pairs - own_pairs)))
        parts_sin.append(jnp.zeros((*still, pairs - own_pairs)))
        cosines.append(jnp.concatenate(parts_cos, axis=-1))
        sines.append(jnp.concatenate(parts_sin, axis=-1))
    return jnp.stack(cosines), jnp.stack(sines)


def _mask_by_type(
    layer_types: tuple[LayerType, ...],
    positions: Array,
    segment_ids: Array | None,
    slots: int | None,
) -> Array | None:
    """The masks `[N, B or 1, 1, T, S]`; `[1, ...]` where all are the same; None: all causal."""
    if slots:
        queries, keys = positions, slots
    else:
        # Positions may start again in a row (packing), so the mask counts places in the row.
        keys = positions.shape[1]
        queries = jnp.arange(keys)[None]

    windows: list[int | None] = []
    for layer_type in layer_types:
        window = layer_type.window
        if not window or window >= keys:  # it would hide nothing
            window = None
        windows.append(window)
    if len(set(windows)) == 1:
        windows = windows[:1]

    if windows == [None] and not slots and segment_ids is None:
        return None
    visible = [causal(queries, keys, window) for window in windows]
    mask = jnp.stack(visible)[:, :, None]  # [N, B or 1, 1, T, S]
    if segment_ids is not None:
        same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]  # [B, T, T]
        mask = mask & same_segment[:, None]
    return mask


def empty_keys_and_values(
    config: DecoderConfig,
    heads: Heads,
    batch: int,
    slots: int,
) -> KeysAndValues:
    """A layer's cache without content: keys and values `[B, K, S, C]` of zeros."""
    shape = (batch, heads.count, slots, heads.dim)
    return {
        "k": jnp.zeros(shape, config.dtype),
        "v": jnp.zeros(shape, config.dtype),
    }
