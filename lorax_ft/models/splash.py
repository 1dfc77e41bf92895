"""Attention on TPUs without a mask of tokens by tokens: Pallas's splash attention.

Blocks of queries and keys that the causal mask, a window or the segments hide are skipped, and no
scores are ever in memory. Shapes: B batch, T tokens, H heads, K key/value heads, G = H / K queries
for each key, C channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorax_ft.mesh_axes import ROW_AXES, TOKEN_AXIS, ambient_sizes, dividing, token_devices
from lorax_ft.models import context
from lorax_ft.models.config import DecoderConfig

LANES = 128  # of a TPU's registers: blocks are multiples of it
LARGEST_BLOCK = 512
INTERPRET = False  # tests interpret the kernel, as CPUs cannot compile it
Kernel = Any  # Pallas's, which it does not export


def missing(
    config: DecoderConfig,
    *,
    tokens: int,
    cached: bool,
    sizes: Mapping[str, int] | None = None,
) -> str | None:
    """What splash attention needs and does not have here; None: nothing.

    Args:
      config: the decoder's.
      tokens: of a row.
      cached: whether keys come from a cache.
      sizes: of the mesh's axes; None: those of the ambient mesh.
    """
    if cached:
        return "no cache"
    if sizes is None:
        sizes = ambient_sizes()
    # Each device has whole blocks.
    multiple = LANES * sizes.get(TOKEN_AXIS, 1)
    if tokens % multiple:
        return f"a data.max_length that is a multiple of {multiple} ({tokens} is not)"
    if config.sinks:
        return "a model without attention sinks"
    split = sizes.get("tensor", 1)
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
    """The kernel on each device's own rows, heads and queries: `[B, K, G, T, C]`."""
    groups, tokens = q.shape[2:4]
    kernel = _kernel(groups, tokens, window=window, cap=cap)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _attend(kernel, q, k, v, segment_ids)
    rows = dividing(ROW_AXES, len(q))
    # Its masks have an axis of heads, which share them, and one of blocks of queries.
    masks = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, TOKEN_AXIS)))
    mapped = context.map_devices(
        _attend,
        in_specs=(
            masks,
            P(rows, "tensor", None, TOKEN_AXIS),
            P(rows, "tensor", TOKEN_AXIS),
            P(rows, "tensor", TOKEN_AXIS),
            P(rows, TOKEN_AXIS),
        ),
        out_specs=P(rows, "tensor", None, TOKEN_AXIS),
    )
    y: Array = mapped(kernel, q, k, v, segment_ids)
    return y


def _attend(kernel: Kernel, q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """`[B, K, G, t, C]` of a device's queries `[B, K, G, t, C]` and its keys and values."""
    k = context.whole_row(k, axis=2)
    v = context.whole_row(v, axis=2)
    ids_of_keys = context.whole_row(segment_ids, axis=1)
    q = context.balanced(q, axis=3)
    ids_of_queries = context.balanced(segment_ids, axis=1)

    def one_row(q: Array, k: Array, v: Array, own: Array, whole: Array) -> Array:
        ids = pallas.SegmentIds(own, whole)
        by_head = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        y: Array = by_head(q, k, v, ids)
        return y

    y = jax.vmap(one_row)(q, k, v, ids_of_queries, ids_of_keys)
    return context.balanced(y, axis=3)


def _kernel(groups: int, tokens: int, *, window: int | None, cap: float | None) -> Kernel:
    """The kernel for rows of so many tokens, whose mask knows the places of each device's own."""
    mask: pallas.CausalMask | pallas.LocalMask
    if window is None:
        mask = pallas.CausalMask((tokens, tokens))
    else:
        # So many tokens to the left, none to the right; a token sees itself too.
        mask = pallas.LocalMask((tokens, tokens), (window - 1, 0), offset=0)
    devices = token_devices()
    mask.q_sequence = _balanced_places(tokens, devices)
    block_q = _block(tokens // devices)
    block_kv = _block(tokens)
    return pallas.make_splash_mqa(
        pallas.MultiHeadMask([mask] * groups),
        block_sizes=pallas.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=devices,
        attn_logits_soft_cap=cap,
        # With these residuals rematerialization need not run it again.
        residual_checkpoint_name="attended",
        interpret=INTERPRET,
    )


def _balanced_places(tokens: int, devices: int) -> np.ndarray:
    """The places in a row of the queries that `context.balanced` gives to each device."""
    halves = np.arange(tokens, dtype=np.int32).reshape(devices, 2, -1)
    halves[:, 1] = halves[::-1, 1].copy()
    return halves.reshape(-1)


def _block(tokens: int) -> int:
    """The largest block that divides so many tokens."""
    return next(size for size in (LARGEST_BLOCK, 256, LANES) if tokens % size == 0)
