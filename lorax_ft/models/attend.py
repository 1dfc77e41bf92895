"""The products of attention: by XLA, in blocks of queries on a CPU, by cuDNN, or by Pallas.

Shapes: B batch, T tokens, S keys, H heads, K key/value heads, G = H / K queries for each key, C
channels of a head.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Literal

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lorax_ft.mesh_axes import ROW_AXES, TOKEN_AXIS, dividing, token_devices
from lorax_ft.models import context, splash
from lorax_ft.models.attend_in_blocks import Scores, attend_in_blocks, causal
from lorax_ft.models.config import DecoderConfig


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
        return attend_in_blocks(q, k, v, mask, scores=scores, sinks=sinks)
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
    if missing is not None and config.attention == "cudnn":
        raise ValueError(f"model.attention is cudnn, which needs {missing}; use auto")
    # For one query cuDNN does the same products, and the cache would be transposed for it.
    if missing is None and queries > 1:
        return "cudnn"
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
