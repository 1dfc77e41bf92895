"""Causal attention, its mask and its cache.

Shapes: B batch, T tokens, S slots of the cache, D width, H heads, K key/value heads,
G = H / K queries for each key, C channels of a head, L layers, N distinct layer types.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.models.config import DecoderConfig, Heads, LayerType
from lorax_ft.models.parts import dense, norm, normalized, projections, softcap
from lorax_ft.models.rope import rotary, rotate

KeysAndValues = dict[str, Array]
# Blocks of queries. Four leave 5/8 of the products; infinitely many would leave a half.
BLOCKS = 4
# Below this, blocks are too small to be worth their overhead.
SMALLEST_BLOCK = 32


class RopeAndMask(NamedTuple):
    """What all layers of a type share, stacked over the N distinct layer types."""

    # [N, B, T, 1, C/2]; 1 where a layer does not encode positions
    cos: Array
    # [N, B, T, 1, C/2]; 0 there
    sin: Array
    # [N, B, 1, T, S], or [1, ...] where all layer types have the same; None: causal
    mask: Array | None


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
        cache: KeysAndValues | None,
    ) -> tuple[Array, KeysAndValues | None]:
        """`[B, T, D]` to `[B, T, D]`, and the cache with the new keys and values.

        Args:
          x: `[B, T, D]`.
          rope_and_mask: of this layer's type, without the axis N.
          positions: `[B, T]`.
          cache: keys and values `[B, S, K, C]`.
        """
        c = self.config
        cos, sin, mask = rope_and_mask
        dim = self.heads.dim
        q, k, v, gate = self._projected(x)

        # A table of several types has the pairs of the widest heads.
        cos = cos[..., : dim // 2]
        sin = sin[..., : dim // 2]
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            k = _write(cache["k"], k, positions)
            v = _write(cache["v"], v, positions)
            cache = {"k": k, "v": v}
        sinks = None
        if c.sinks:
            sinks = self.param("sinks", nn.initializers.zeros, (c.heads,))
        y = attend(c, q, k, v, mask, sinks=sinks)
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
    layer_types = config.each_layer
    attending = [layer_type for layer_type in layer_types if layer_type.linear is None]
    distinct = tuple(dict.fromkeys(attending))
    cos, sin = _rope_by_type(distinct, positions, length)
    mask = _mask_by_type(distinct, positions, segment_ids, slots)
    indices = []
    for layer_type in layer_types:
        # Linear attention reads neither, so its index has no meaning.
        indices.append(0 if layer_type.linear else distinct.index(layer_type))
    return RopeAndMask(cos, sin, mask), jnp.array(indices)


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
    visible = [_causal(queries, keys, window) for window in windows]
    mask = jnp.stack(visible)[:, :, None]  # [N, B or 1, 1, T, S]
    if segment_ids is not None:
        same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]  # [B, T, T]
        mask = mask & same_segment[:, None]
    return mask


def _causal(queries: Array, keys: int, window: int | None = None) -> Array:
    """Which of so many keys the queries at places `[...]` see: `[..., keys]`."""
    key = jnp.arange(keys)
    query = queries[..., None]
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    return visible


def attend(
    config: DecoderConfig,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    *,
    sinks: Array | None = None,
) -> Array:
    """softmax(scale · Q Kᵀ) V.

    Args:
      config: the decoder's.
      q: queries `[B, T, H, C]`.
      k: keys `[B, S, K, C]`.
      v: values `[B, S, K, C]`.
      mask: `[B, 1, T, S]`; None: causal.
      sinks: a score of each head `[H]` beside those of its keys, whose value is 0; None: none.
    """
    scale = config.attention_scale
    if scale is None:
        scale = q.shape[-1] ** -0.5
    cap = config.attention_softcap
    queries = q.shape[1]
    keys = k.shape[1]
    masked = mask is not None
    implementation = _implementation(
        config, dim=q.shape[-1], queries=queries, keys=keys, masked=masked
    )
    # jax.nn.dot_product_attention has neither a soft cap nor sinks.
    if implementation == "blocks" or cap is not None or sinks is not None:
        return _attend_in_blocks(q, k, v, mask, scale=scale, cap=cap, sinks=sinks)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        # With a cache there are more slots than queries, and the mask says what a query sees.
        is_causal=queries == keys,
        implementation=implementation,
    )


def _attend_in_blocks(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    *,
    scale: float,
    cap: float | None,
    sinks: Array | None,
) -> Array:
    """`attend`, with heads before tokens, and in blocks of queries that leave out all later keys.

    On a CPU it takes 0.4 of the time of jax.nn.dot_product_attention (jax 0.10.2, forward and
    backward, 256 tokens).
    """
    b, t, h, c = q.shape
    s, kv_heads = k.shape[1:3]
    q = q.reshape(b, t, kv_heads, h // kv_heads, c)
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, C]
    k = k.transpose(0, 2, 1, 3)  # [B, K, S, C]
    v = v.transpose(0, 2, 1, 3)
    if sinks is not None:
        sinks = sinks.reshape(kv_heads, h // kv_heads, 1)  # [K, G, 1]

    without_cache = t == s
    n = t  # queries in a block
    if without_cache and t % BLOCKS == 0 and t >= SMALLEST_BLOCK * BLOCKS:
        n = t // BLOCKS
    blocks = []
    for start in range(0, t, n):
        stop = start + n
        keys = s
        if without_cache:
            keys = stop  # later keys are hidden from all queries of the block
        if mask is None:
            visible = _causal(start + jnp.arange(n), keys)
        else:
            visible = mask[:, :, None, start:stop, :keys]
        rows = q[:, :, :, start:stop]
        block = _attend_one_block(
            rows,
            k[:, :, :keys],
            v[:, :, :keys],
            visible,
            scale=scale,
            cap=cap,
            sinks=sinks,
        )
        blocks.append(block)
    y = jnp.concatenate(blocks, axis=3)
    y = y.transpose(0, 3, 1, 2, 4)  # [B, T, K, G, C]
    return y.reshape(b, t, h, c)


def _attend_one_block(
    q: Array,
    k: Array,
    v: Array,
    visible: Array,
    *,
    scale: float,
    cap: float | None,
    sinks: Array | None,
) -> Array:
    """softmax(cap(scale · Q Kᵀ)) V of queries `[B, K, G, T, C]` and keys, values `[B, K, S, C]`.

    Sinks are `[K, G, 1]`.
    """
    b, kv_heads, groups, t, c = q.shape
    s = k.shape[2]
    # The queries of a key are the rows of one matrix.
    rows = q.reshape(b, kv_heads, groups * t, c)
    scores = jnp.einsum("bkrc,bksc->bkrs", rows, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, kv_heads, groups, t, s)
    scores = softcap(scale * scores, cap)
    # Not −inf: a row in which nothing is visible would become NaN.
    smallest = jnp.finfo(jnp.float32).min
    scores = jnp.where(visible, scores, smallest)
    p = jax.nn.softmax(scores)
    if sinks is not None:
        # What the sink leaves to the keys: Σ exp(score) / (Σ exp(score) + exp(sink)).
        total = jax.nn.logsumexp(scores, axis=-1)  # [B, K, G, T]
        left = jax.nn.sigmoid(total - sinks.astype(jnp.float32))
        p = p * left[..., None]
    p = p.astype(v.dtype)
    p = p.reshape(b, kv_heads, groups * t, s)
    y = jnp.einsum("bkrs,bksc->bkrc", p, v)
    return y.reshape(b, kv_heads, groups, t, c)


def empty_keys_and_values(
    config: DecoderConfig, heads: Heads, batch: int, slots: int
) -> KeysAndValues:
    """A layer's cache without content: keys and values `[B, S, K, C]` of zeros."""
    shape = (batch, slots, heads.count, heads.dim)
    return {
        "k": jnp.zeros(shape, config.dtype),
        "v": jnp.zeros(shape, config.dtype),
    }


def _write(cache: Array, new: Array, positions: Array) -> Array:
    """The cache `[B, S, K, C]` with `new` `[B, T, K, C]` from each row's first position on."""

    def write_row(slots: Array, part: Array, start: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(slots, part, start, axis=0)

    starts = positions[:, 0]
    return jax.vmap(write_row)(cache, new, starts)


def _implementation(
    config: DecoderConfig,
    *,
    dim: int,
    queries: int,
    keys: int,
    masked: bool,
) -> Literal["xla", "cudnn", "blocks"]:
    """The implementation for so many queries and keys, with heads of `dim` channels."""
    if config.attention == "xla":
        return "xla"
    missing = _missing_for_cudnn(config, dim=dim, queries=queries, keys=keys, masked=masked)
    if missing is None:
        return "cudnn"
    if config.attention == "cudnn":
        raise ValueError(f"model.attention is cudnn, which needs {missing}; use auto")
    if jax.default_backend() == "cpu":
        return "blocks"
    return "xla"


def _missing_for_cudnn(
    config: DecoderConfig,
    *,
    dim: int,
    queries: int,
    keys: int,
    masked: bool,
) -> str | None:
    """What cuDNN's attention needs and does not have here, by jax 0.10's rules; None: nothing."""
    backend = jax.default_backend()
    if backend != "gpu":
        return f"a GPU (the backend is {backend})"
    capability = jax.local_devices()[0].compute_capability
    # AMD's GPUs have names such as gfx90a instead of two numbers.
    numbers = re.fullmatch(r"(\d+)\.\d+", capability)
    generation = 0
    if numbers:
        generation = int(numbers[1])
    if generation < 8:
        return "a GPU of NVIDIA's Ampere generation or later"

    if config.dtype != "bfloat16":
        return "model.dtype bfloat16"
    if config.attention_softcap is not None:
        return "a model without a soft cap on attention scores"
    if config.sinks:
        return "a model without attention sinks"
    widest = 128
    if generation >= 9:
        widest = 256
    if dim > widest or dim % 8:
        return f"a head_dim of at most {widest} that is a multiple of 8"
    with_cache = queries != keys
    if masked and not with_cache and queries % 2:
        return "an even data.max_length under a mask"
    return None
