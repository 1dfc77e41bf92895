"""The products of attention: by XLA, in blocks of queries on a CPU, or by cuDNN.

Shapes: B batch, T tokens, S keys, H heads, K key/value heads, G = H / K queries for each key, C
channels of a head.
"""

from __future__ import annotations

import re
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

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

    blocks = []
    for start, stop, keys in _blocks(t, s):
        if mask is None:
            visible = causal(jnp.arange(start, stop), keys)
        else:
            visible = mask[:, :, None, start:stop, :keys]
        block = _attend_one_block(
            q[:, :, :, start:stop],
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


def _blocks(queries: int, keys: int) -> list[tuple[int, int, int]]:
    """Blocks of queries: the first, the one after the last, and the keys that the block needs."""
    # With a cache there are more keys than queries, and a block may see any of them.
    if queries != keys:
        return [(0, queries, keys)]
    if queries % BLOCKS or queries < SMALLEST_BLOCK * BLOCKS:
        return [(0, queries, keys)]
    size = queries // BLOCKS
    # Keys after a block are hidden from all of its queries.
    return [(stop - size, stop, stop) for stop in range(size, queries + 1, size)]


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
