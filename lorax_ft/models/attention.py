"""Attention: what a token sees, and how much of it.

Shapes: B batch, T tokens, S slots of the cache, D width, H heads, K key/value heads, C channels of a head, L layers,
N distinct kinds of layers.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.parts import dense, norm, projections, softcap
from lorax_ft.models.rope import rotary, rotate

Cache = dict[str, Array]
BLOCKS = 4  # of queries: an eighth more than half of the products is left


class RopeAndMask(NamedTuple):
    """What all layers of a kind share, stacked over the N distinct kinds."""

    cos: Array
    """`[N, B, T, 1, C/2]`; 1 where a layer does not know positions."""
    sin: Array
    mask: Array | None
    """`[N, B, 1, T, S]`, or `[1, ...]` where all kinds see the same; None is causal."""


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (2305.13245)."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Array, around: RopeAndMask, positions: Array, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        """`[B, T, D]` to `[B, T, D]`; `around` without its axis N, positions `[B, T]`."""
        c = self.config
        widths = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
        q, k, v = projections(c, x, widths, ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        if c.qk_norm == "whole":
            q, k = norm(c, "q_norm")(q), norm(c, "k_norm")(k)
        q, k, v = (y.reshape(*y.shape[:2], -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = norm(c, "q_norm")(q), norm(c, "k_norm")(k)
        q, k = rotate(q, around.cos, around.sin), rotate(k, around.cos, around.sin)
        if cache is not None:
            cache = {"k": _write(cache["k"], k, positions), "v": _write(cache["v"], v, positions)}
            k, v = cache["k"], cache["v"]
        y = attend(c, q, k, v, around.mask)
        return dense(c, c.width, "o_proj")(y.reshape(*y.shape[:2], -1)), cache


def rope_and_mask(
    config: DecoderConfig,
    positions: Array,
    segment_ids: Array | None,
    *,
    slots: int | None,
    length: Array | None,
) -> tuple[RopeAndMask, Array]:
    """What layers share by kind, and the kind of each layer `[L]`; `slots` are a cache's, `length` `[B]` the texts'."""
    kinds = config.kinds if len(config.kinds) > 1 else config.kinds * config.layers
    distinct = tuple(dict.fromkeys(kinds))
    dims = next((kind.rope.dims for kind in distinct if kind.rope), 2)
    still = (
        jnp.ones((*positions.shape, 1, dims // 2)),
        jnp.zeros((*positions.shape, 1, dims // 2)),
    )
    turns = [
        rotary(kind.rope, positions, length=length) if kind.rope else still for kind in distinct
    ]
    cos, sin = (jnp.stack(parts) for parts in zip(*turns, strict=True))
    # A token's place in its row, or in the cache; a window that is longer than the row hides nothing.
    rows = positions if slots else jnp.arange(positions.shape[1])[None]
    places = slots or positions.shape[1]
    windows = [kind.window if kind.window and kind.window < places else None for kind in distinct]
    if len(set(windows)) == 1:
        windows = windows[:1]
    mask = None
    if slots or segment_ids is not None or windows != [None]:
        mask = jnp.stack(
            [_causal(rows, places, window)[:, None] for window in windows]
        )  # [N, B or 1, 1, T, S]
        if segment_ids is not None:
            mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return RopeAndMask(cos, sin, mask), jnp.array([distinct.index(kind) for kind in kinds])


def _causal(places: Array, length: int, window: int | None = None) -> Array:
    """Which of `length` places a token at `places` `[...]` sees: `[..., length]`."""
    seen = jnp.arange(length) <= places[..., None]
    return seen if window is None else seen & (jnp.arange(length) > places[..., None] - window)


def attend(config: DecoderConfig, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Attention of queries `[B, T, H, C]` to keys and values `[B, S, K, C]`; mask `[B, 1, T, S]`, or None: causal."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    kernel = _attention_kernel(config, tokens=(q.shape[1], k.shape[1]), masked=mask is not None)
    if kernel == "blocks" or config.attention_softcap is not None:
        return _attend_in_blocks(q, k, v, mask, scale=scale, cap=config.attention_softcap)
    causal = q.shape[1] == k.shape[1]  # with a cache there are more slots than queries
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=causal, implementation=kernel
    )


def _attend_in_blocks(
    q: Array, k: Array, v: Array, mask: Array | None, *, scale: float, cap: float | None
) -> Array:
    """`attend` with heads before rows, and in blocks of queries that leave out the keys behind them.

    On a CPU it takes 0.4 of the time of jax.nn.dot_product_attention (jax 0.10.2, forward and backward, 256 tokens).
    """
    b, t, h, c = q.shape
    s, heads = k.shape[1:3]
    q = q.reshape(b, t, heads, h // heads, c).transpose(
        0, 2, 3, 1, 4
    )  # [B, K, G, T, C], G queries a key
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, S, C]
    n = t // BLOCKS if t == s and t % BLOCKS == 0 and t >= 32 * BLOCKS else t
    parts = []
    for start in range(0, t, n):
        seen = start + n if t == s else s
        rows = q[:, :, :, start : start + n].reshape(b, heads, -1, c)
        scores = jnp.einsum(
            "bkrc,bksc->bkrs", rows, k[:, :, :seen], preferred_element_type=jnp.float32
        )
        scores = softcap(scale * scores.reshape(b, heads, h // heads, n, seen), cap)
        visible = (
            _causal(start + jnp.arange(n), seen)
            if mask is None
            else mask[:, :, None, start : start + n, :seen]
        )
        p = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min)).astype(v.dtype)
        y = jnp.einsum("bkrs,bksc->bkrc", p.reshape(b, heads, -1, seen), v[:, :, :seen])
        parts.append(y.reshape(b, heads, h // heads, n, c))
    return jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)


def empty_cache(config: DecoderConfig, batch: int, slots: int) -> Cache:
    """Keys and values `[L, B, S, K, C]` of nothing yet."""
    shape = (config.layers, batch, slots, config.kv_heads, config.head_dim)
    return {"k": jnp.zeros(shape, config.dtype), "v": jnp.zeros(shape, config.dtype)}


def _write(cache: Array, new: Array, positions: Array) -> Array:
    """The cache `[B, S, K, C]` with `new` `[B, T, K, C]` in the slots from each row's first position on."""
    return jax.vmap(
        lambda row, part, start: lax.dynamic_update_slice_in_dim(row, part, start, axis=0)
    )(cache, new, positions[:, 0])


def _attention_kernel(
    config: DecoderConfig, *, tokens: tuple[int, int], masked: bool
) -> Literal["xla", "cudnn", "blocks"]:
    """What computes attention of so many queries to so many keys."""
    if config.attention == "xla":
        return "xla"
    lacks = _cudnn_lacks(config, tokens=tokens, masked=masked)
    if config.attention == "cudnn" and lacks:
        raise ValueError(f"model.attention is cudnn, which needs {lacks}; take auto")
    return "cudnn" if not lacks else "blocks" if jax.default_backend() == "cpu" else "xla"


def _cudnn_lacks(config: DecoderConfig, *, tokens: tuple[int, int], masked: bool) -> str | None:
    """What cuDNN's attention needs and does not have here, by the rules of jax 0.10; None where it can be taken."""
    backend = jax.default_backend()
    if backend != "gpu":
        return f"a GPU, and this is a {backend}"
    named = re.fullmatch(
        r"(\d+)\.(\d+)", jax.local_devices()[0].compute_capability
    )  # AMD's are not so named
    generation = (int(named[1]), int(named[2])) if named else (0, 0)
    trains = tokens[0] == tokens[1]  # with a cache there are more slots than queries
    widest = 256 if generation >= (9, 0) else 128
    needs = {
        "a GPU of NVIDIA's Ampere generation or later": generation >= (8, 0),
        "model.dtype bfloat16": config.dtype == "bfloat16",
        "no soft cap": config.attention_softcap is None,
        f"heads of a width below {widest + 1} that 8 divides": config.head_dim <= widest
        and config.head_dim % 8 == 0,
        "an even data.max_length under a mask": not (masked and trains) or tokens[0] % 2 == 0,
    }
    return next((need for need, met in needs.items() if not met), None)
