"""The products of attention: by XLA, in blocks of queries on a CPU, by cuDNN, or by Pallas.

Shapes: B batch, T tokens, S keys, H heads, K key/value heads, G = H / K queries for each key, C
channels of a head.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lorax_ft.mesh_axes import ROW_AXES, TOKEN_AXIS, dividing, token_devices
from lorax_ft.models import context, splash
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.parts import softcap

# Blocks of queries. Four leave 5/8 of the products; infinitely many would leave a half.
BLOCKS = 4
# Below this, blocks are too small to be worth their overhead.
SMALLEST_BLOCK = 32


def causal(queries: Array, keys: int, window: int | None = None) -> Array:
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
    segment_ids: Array | None,
    layer_type: Array,
    sinks: Array | None = None,
) -> Array:
    """softmax(scale · Q Kᵀ) V.

    Args:
      config: the decoder's.
      q: queries `[B, T, H, C]`.
      k: keys `[B, S, K, C]`.
      v: values `[B, S, K, C]`.
      mask: `[B, 1, T, S]`; None: causal, or what `needs_no_mask` sees by itself.
      segment_ids: `[B, T]`; None: one segment for each row.
      layer_type: the layer's, an index into `config.attention_types`.
      sinks: a score of each head `[H]` beside those of its keys, whose value is 0; None: none.
    """
    scale = config.attention_scale
    if scale is None:
        scale = q.shape[-1] ** -0.5
    cap = config.attention_softcap
    queries = q.shape[1]
    keys = k.shape[1]
    masked = mask is not None
    if mask is None and needs_no_mask(config, tokens=queries, cached=queries != keys):
        return splash.splash(
            q,
            k,
            v,
            segment_ids,
            windows=[each.window for each in config.attention_types],
            which=layer_type,
            scale=scale,
            cap=cap,
        )
    implementation = _implementation(
        config, dim=q.shape[-1], queries=queries, keys=keys, masked=masked
    )
    plain = functools.partial(_attend, scores=Scores(scale, cap), implementation=implementation)
    if token_devices() == 1 or queries != keys or dividing(TOKEN_AXIS, queries) is None:
        return plain(q, k, v, mask, sinks)
    return _attend_in_context(plain, q, k, v, mask, sinks)


class Scores(NamedTuple):
    """How scores come from queries and keys."""

    scale: float
    cap: float | None


Implementation = Literal["xla", "cudnn", "blocks"]


def _attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    sinks: Array | None,
    *,
    scores: Scores,
    implementation: Implementation,
) -> Array:
    """`attend` by one implementation."""
    # jax.nn.dot_product_attention has neither a soft cap nor sinks.
    if implementation == "blocks" or scores.cap is not None or sinks is not None:
        return _attend_in_blocks(q, k, v, mask, scores=scores, sinks=sinks)
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scores.scale,
        # Where there are more keys than queries, the mask says what a query sees.
        is_causal=q.shape[1] == k.shape[1],
        implementation=implementation,
    )
    return checkpoint_name(y, "attended")


def _attend_in_context(
    plain: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    sinks: Array | None,
) -> Array:
    """`attend` where the tokens of a row are split over devices: see `lorax_ft.models.context`."""

    def on_device(q: Array, k: Array, v: Array, mask: Array | None, sinks: Array | None) -> Array:
        k = context.whole_row(k, axis=1)
        v = context.whole_row(v, axis=1)
        if mask is None:
            own = context.own_places(q.shape[1])
            mask = causal(own, k.shape[1])[None, None]
        return plain(q, k, v, mask, sinks)

    rows = dividing(ROW_AXES, len(q))
    heads = dividing("tensor", k.shape[2])
    by_head = P(rows, TOKEN_AXIS, heads)
    rows_of_mask = None if mask is None or len(mask) == 1 else rows
    mapped = context.map_devices(
        on_device,
        in_specs=(by_head, by_head, by_head, P(rows_of_mask, None, TOKEN_AXIS), P(heads)),
        out_specs=by_head,
    )
    y: Array = mapped(q, k, v, mask, sinks)
    return y


def _attend_in_blocks(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    *,
    scores: Scores,
    sinks: Array | None,
) -> Array:
    """`attend`, with heads before tokens, and in blocks of queries that leave out all later keys.

    On a CPU it takes 0.4 of the time of jax.nn.dot_product_attention (jax 0.10.2, forward and
    backward, 256 tokens).
    """
    b, t, h, c = q.shape
    kv_heads = k.shape[2]
    groups = h // kv_heads
    q = q.reshape(b, t, kv_heads, groups, c)
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, C]
    k = k.transpose(0, 2, 1, 3)  # [B, K, S, C]
    v = v.transpose(0, 2, 1, 3)
    if sinks is not None:
        sinks = sinks.reshape(kv_heads, groups, 1)  # [K, G, 1]
    y = _weighted_values(scores, q, k, v, mask, sinks)
    y = y.transpose(0, 3, 1, 2, 4)  # [B, T, K, G, C]
    return y.reshape(b, t, h, c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_values(
    scores: Scores,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    sinks: Array | None,
) -> Array:
    """softmax(scores) V of queries `[B, K, G, T, C]` and keys and values `[B, K, S, C]`."""
    y, _ = _weighted_values_forward(scores, q, k, v, mask, sinks)
    return y


def _weighted_values_forward(
    scores: Scores,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    sinks: Array | None,
) -> tuple[Array, Any]:
    """The values, and what the backward pass needs: no scores, which it computes again."""
    ys = []
    largest = []
    totals = []
    for block in _blocks(q.shape[3], k.shape[2]):
        z, _ = _scores(scores, q, k, mask, block)
        top = jnp.max(z, axis=-1, keepdims=True)
        if sinks is not None:
            # A key whose value is 0.
            sink = sinks[..., None].astype(jnp.float32)
            top = jnp.maximum(top, sink)
        p = jnp.exp(z - top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(sink - top)
        y = _rows_product("bkrs,bksc->bkrc", p.astype(v.dtype), v[:, :, : block.keys])
        ys.append(y / total)
        largest.append(top)
        totals.append(total)
    y = jnp.concatenate(ys, axis=3).astype(v.dtype)
    # Named for the policy of rematerialization: with them nothing here is computed again.
    y = checkpoint_name(y, "attended")
    top = checkpoint_name(jnp.concatenate(largest, axis=3), "attended")  # [B, K, G, T, 1]
    total = checkpoint_name(jnp.concatenate(totals, axis=3), "attended")
    return y, (q, k, v, mask, sinks, y, top, total)


def _weighted_values_backward(scores: Scores, residuals: Any, d_y: Array) -> tuple[Any, ...]:
    """The gradients to q, k, v and sinks, as of FlashAttention-2 (2307.08691)."""
    q, k, v, mask, sinks, y, top, total = residuals
    # Σ p · dp of each query, which is Σ y · dy.
    mean = jnp.sum(y.astype(jnp.float32) * d_y.astype(jnp.float32), axis=-1, keepdims=True)
    d_qs = []
    d_k = jnp.zeros(k.shape, jnp.float32)
    d_v = jnp.zeros(v.shape, jnp.float32)
    for block in _blocks(q.shape[3], k.shape[2]):
        part = slice(block.start, block.stop)
        q_block = q[:, :, :, part]
        d_y_block = d_y[:, :, :, part]
        z, slope = _scores(scores, q, k, mask, block)
        p = jnp.exp(z - top[:, :, :, part]) / total[:, :, :, part]
        d_p = _rows_product("bkrc,bksc->bkrs", d_y_block, v[:, :, : block.keys])
        d_z = p * (d_p - mean[:, :, :, part]) * slope
        d_z = d_z.astype(k.dtype)
        d_qs.append(_rows_product("bkrs,bksc->bkrc", d_z, k[:, :, : block.keys]))
        d_k = d_k.at[:, :, : block.keys].add(_keys_product(d_z, q_block))
        d_v = d_v.at[:, :, : block.keys].add(_keys_product(p.astype(v.dtype), d_y_block))
    d_sinks = None
    if sinks is not None:
        p_sink = jnp.exp(sinks[..., None].astype(jnp.float32) - top) / total
        d_sinks = -jnp.sum(p_sink * mean, axis=(0, 3, 4))[..., None].astype(sinks.dtype)
    d_q = jnp.concatenate(d_qs, axis=3).astype(q.dtype)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, d_sinks


_weighted_values.defvjp(_weighted_values_forward, _weighted_values_backward)


class Block(NamedTuple):
    """A block of queries, and how many keys it may see."""

    start: int
    stop: int
    keys: int


def _blocks(queries: int, keys: int) -> list[Block]:
    """The blocks of so many queries."""
    if queries % BLOCKS or queries < SMALLEST_BLOCK * BLOCKS:
        return [Block(0, queries, keys)]
    size = queries // BLOCKS
    stops = range(size, queries + 1, size)
    if queries != keys:
        # With a cache, or where others have the queries before these, a block may see any key.
        return [Block(stop - size, stop, keys) for stop in stops]
    # Keys after a block are hidden from all of its queries.
    return [Block(stop - size, stop, stop) for stop in stops]


def _scores(
    scores: Scores,
    q: Array,
    k: Array,
    mask: Array | None,
    block: Block,
) -> tuple[Array, Array | float]:
    """cap(scale · Q Kᵀ) of a block, float32 `[B, K, G, T, S]`, and its derivative by Q Kᵀ."""
    part = slice(block.start, block.stop)
    products = _rows_product("bkrc,bksc->bkrs", q[:, :, :, part], k[:, :, : block.keys])
    z = scores.scale * products
    slope: Array | float = scores.scale
    if scores.cap is not None:
        z = softcap(z, scores.cap)
        slope = scores.scale * (1 - (z / scores.cap) ** 2)
    if mask is None:
        visible = causal(jnp.arange(block.start, block.stop), block.keys)
    else:
        visible = mask[:, :, None, part, : block.keys]
    # Not −inf: a row in which nothing is visible would become NaN.
    return jnp.where(visible, z, jnp.finfo(jnp.float32).min), slope


def _rows_product(equation: str, x: Array, keys: Array) -> Array:
    """The einsum of x `[B, K, G, T, ...]` and keys `[B, K, S, C]`, in float32.

    The queries of a key are the rows r of one matrix.
    """
    b, kv_heads, groups, t, last = x.shape
    rows = x.reshape(b, kv_heads, groups * t, last)
    y = jnp.einsum(equation, rows, keys, preferred_element_type=jnp.float32)
    return y.reshape(b, kv_heads, groups, t, y.shape[-1])


def _keys_product(weights: Array, x: Array) -> Array:
    """Σ over the queries of a key: weights `[B, K, G, T, S]`, x `[B, K, G, T, C]`, float32."""
    b, kv_heads, groups, t, s = weights.shape
    weight_rows = weights.reshape(b, kv_heads, groups * t, s)
    rows = x.reshape(b, kv_heads, groups * t, x.shape[-1])
    return jnp.einsum("bkrs,bkrc->bksc", weight_rows, rows, preferred_element_type=jnp.float32)


def needs_no_mask(config: DecoderConfig, *, tokens: int, cached: bool) -> bool:
    """Whether attention sees segments and windows by itself: splash attention, where it fits."""
    chosen = config.attention == "splash"
    if config.attention == "auto":
        chosen = jax.default_backend() == "tpu"
    # Rows of another length, such as those of an evaluation, take another implementation.
    return chosen and splash.missing(config, tokens=tokens, cached=cached) is None


def _implementation(
    config: DecoderConfig,
    *,
    dim: int,
    queries: int,
    keys: int,
    masked: bool,
) -> Implementation:
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
