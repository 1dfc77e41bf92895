"""Attention on TPUs without a mask of tokens by tokens: Pallas's splash attention.

Blocks of queries and keys that the causal mask, a window or the segments hide are skipped, and no
scores are ever in memory. Shapes: B batch, T tokens, H heads, K key/value heads, G = H / K queries
for each key, C channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import PartitionSpec as P

from lorax_ft.models.config import DecoderConfig
from lorax_ft.sharding import ROW_AXES, row_devices

LANES = 128  # of a TPU's registers: blocks are multiples of it
LARGEST_BLOCK = 512
INTERPRET = False  # tests interpret the kernel, as CPUs cannot compile it


def missing(
    config: DecoderConfig, *, tokens: int, cached: bool, split: int | None = None
) -> str | None:
    """What splash attention needs and does not have here; None: nothing.

    Args:
      config: the decoder's.
      tokens: of a row.
      cached: whether keys come from a cache.
      split: over how many devices heads are split; None: as in the ambient mesh.
    """
    if cached:
        return "no cache"
    if tokens % LANES:
        return f"a data.max_length that is a multiple of {LANES} ({tokens} is not)"
    if config.sinks:
        return "a model without attention sinks"
    if split is None:
        split = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    counts = {config.heads_of(layer_type).count for layer_type in config.each_layer}
    if any(count % split for count in counts):
        return f"key/value heads that mesh.tensor {split} divides"
    return None


def splash(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    *,
    windows: Sequence[int | None],
    which: Array,
    scale: float,
    cap: float | None,
) -> Array:
    """softmax(cap(scale · Q Kᵀ)) V, causal, within a window and within segments: `[B, T, H, C]`.

    Args:
      q: queries `[B, T, H, C]`.
      k: keys `[B, T, K, C]`.
      v: values `[B, T, K, C]`.
      segment_ids: `[B, T]`; None: one segment for each row.
      windows: how many tokens a token sees, by the type of layer; None: all before it.
      which: the type of this layer, an index into them.
      scale: of the scores.
      cap: the c of c · tanh(x / c); None: none.
    """
    b, t, h, c = q.shape
    kv_heads = k.shape[2]
    q = (scale * q.astype(jnp.float32)).astype(q.dtype)
    q = q.reshape(b, t, kv_heads, h // kv_heads, c)
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, C]
    k = k.transpose(0, 2, 1, 3)  # [B, K, T, C]
    v = v.transpose(0, 2, 1, 3)
    if segment_ids is None:
        segment_ids = jnp.zeros((b, t), jnp.int32)

    # A window as long as a row hides nothing.
    windows = [None if window and window >= t else window for window in windows]
    distinct = list(dict.fromkeys(windows))
    branches = [functools.partial(_on_mesh, window=window, cap=cap) for window in distinct]
    if len(branches) == 1:
        y = branches[0](q, k, v, segment_ids)
    else:
        # The mask is a constant of the kernel, and the layers of a scan share their code.
        places = jnp.array([distinct.index(window) for window in windows])
        y = lax.switch(places[which], branches, q, k, v, segment_ids)
    y = y.transpose(0, 3, 1, 2, 4)  # [B, T, K, G, C]
    return y.reshape(b, t, h, c)


def _on_mesh(
    q: Array, k: Array, v: Array, segment_ids: Array, *, window: int | None, cap: float | None
) -> Array:
    """The kernel on each device's own rows and heads."""
    attend = functools.partial(_attend, window=window, cap=cap)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q, k, v, segment_ids)
    rows = ROW_AXES if len(q) % row_devices() == 0 else None
    heads = P(rows, "tensor")
    # Pallas cannot be partitioned by XLA.
    mapped = jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, P(rows)),
        out_specs=heads,
        check_vma=False,
    )
    return mapped(q, k, v, segment_ids)


def _attend(
    q: Array, k: Array, v: Array, segment_ids: Array, *, window: int | None, cap: float | None
) -> Array:
    """`[B, K, G, T, C]` of queries `[B, K, G, T, C]` and keys and values `[B, K, T, C]`."""
    groups, tokens = q.shape[2:4]
    mask: pallas.Mask
    if window is None:
        mask = pallas.CausalMask((tokens, tokens))
    else:
        # So many tokens to the left, none to the right; a token sees itself too.
        mask = pallas.LocalMask((tokens, tokens), (window - 1, 0), offset=0)
    size = next(size for size in (LARGEST_BLOCK, 256, LANES) if tokens % size == 0)
    kernel = pallas.make_splash_mqa_single_device(
        pallas.MultiHeadMask([mask] * groups),
        block_sizes=pallas.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        attn_logits_soft_cap=cap,
        # With these residuals rematerialization need not run it again.
        residual_checkpoint_name="attended",
        interpret=INTERPRET,
    )

    def one_row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        ids = pallas.SegmentIds(segments, segments)
        by_head = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        y: Array = by_head(q, k, v, ids)
        return y

    return jax.vmap(one_row)(q, k, v, segment_ids)
