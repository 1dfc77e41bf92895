"""The cross-entropy fused with the output head: full logits never exist, and are computed once.

Letters: B batch, T tokens, D width, V vocabulary, N chunks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from lorax_ft.constraints import gather_inputs
from lorax_ft.lowrank.terms import dropout as dropout_term
from lorax_ft.mesh_axes import TOKEN_AXIS, dividing, row_devices, token_devices
from lorax_ft.tree import Layer

Labels = dict[str, Array]
Score = Callable[[Layer, Array], Array]
CHUNK_ROWS = 512  # tokens whose logits exist at once, on each device


def head_loss(
    layer: Layer,
    features: Array,
    targets: Array,
    weights: Array,
    *,
    score: Score,
    chunk_rows: int | None = None,
) -> Array:
    """Σ weights · cross-entropy of softmax(head(features)), in chunks of the tokens' axis.

    Only chunks with labeled tokens are computed, and labeled tokens come first in them, so that
    the head costs about as much as there are labels.

    The gradient to the features, and to those leaves of the head that train, is computed in the
    forward pass beside the loss, so that logits are neither kept nor computed twice.

    Args:
      layer: the head: kernel `[D, V]` and its adapter.
      features: `[B, T, D]`.
      targets: `[B, T]`, the next tokens.
      weights: `[B, T]` float32; 0 excludes a token.
      score: the logits `[..., V]` of a head and features `[..., D]`.
      chunk_rows: tokens in a chunk, which needs 4 · chunk_rows · V bytes. None: `CHUNK_ROWS` for
        each device of the ambient mesh that has tokens of its own.

    Returns:
      A float32 scalar, the sum.
    """
    chex.assert_rank(features, 3)
    chex.assert_equal_shape([targets, weights])
    batch, tokens = targets.shape
    if not chunk_rows:
        chunk_rows = CHUNK_ROWS * row_devices() * token_devices()
    needed = math.ceil(batch * tokens / chunk_rows)
    # Of each device's tokens a part is in every chunk.
    shards = token_devices() if dividing(TOKEN_AXIS, tokens) else 1
    chunks = min(needed, tokens // shards)

    def by_shard(x: Array) -> Array:
        return x.reshape(batch, shards, tokens // shards, *x.shape[2:])

    # Labeled tokens first: the last chunks have only prompts and padding, and are skipped.
    order = jnp.argsort(by_shard(weights) == 0, axis=2)

    def chunked(x: Array) -> Array:
        x = by_shard(x)
        places = order.reshape(*order.shape, *[1] * (x.ndim - 3))
        return _split(jnp.take_along_axis(x, places, axis=2), chunks=chunks)

    labels = {
        "targets": chunked(targets),
        "weights": chunked(weights),
        "chunk": jnp.arange(chunks),
    }
    layer = layer | {"kernel": gather_inputs(layer["kernel"])}
    chunk_loss = functools.partial(_chunk_loss, score)
    return _fused(chunk_loss, layer, chunked(features), labels)


def _split(x: Array, *, chunks: int) -> Array:
    """`[B, S, T / S, ...]` as chunks `[N, B, t, ...]`, each with as many tokens of every shard S.

    Rows and shards stay whole, so that each token stays on its device.
    """
    batch, shards, tokens, *rest = x.shape
    # Zeros, of which the weights are weights, make all chunks equal.
    padding = -tokens % chunks
    padded = jnp.pad(x, [(0, 0), (0, 0), (0, padding), *[(0, 0)] * len(rest)])
    by_chunk = padded.reshape(batch, shards, chunks, -1, *rest)
    first = jnp.moveaxis(by_chunk, 2, 0)  # [N, B, S, t / S, ...]
    return first.reshape(chunks, batch, -1, *rest)


def _chunk_loss(
    score: Score,
    layer: Layer,
    features: Array,
    labels: Labels,
) -> Array:
    """Σ w (log Σ exp z − z_target) of one chunk, in float32."""
    # Each chunk drops out other features.
    layer = dropout_term.fold_in(layer, labels["chunk"])
    logits = score(layer, features)
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels["targets"])
    return jnp.sum(labels["weights"] * losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    loss: Callable[..., Array],
    layer: Layer,
    features: Array,
    labels: Labels,
) -> Array:
    """The sum of `loss` over chunks `[N, B, t, ...]`."""

    def value_of(chunk: tuple[Array, Labels]) -> Array:
        return lax.cond(_has_labels(chunk[1]), lambda: loss(layer, *chunk), lambda: jnp.zeros(()))

    return jnp.sum(lax.map(value_of, (features, labels)))


def _fused_forward(
    loss: Callable[..., Array],
    layer: Any,
    features: Any,
    labels: Any,
) -> tuple[Array, Any]:
    """The sum, and as residuals the gradients to the layer's trained leaves and to the features.

    With symbolic zeros each argument says whether it is differentiated (`perturbed`).
    """
    trained: Layer = {}
    fixed: Layer = {}
    for name, leaf in layer.items():
        part = trained if leaf.perturbed else fixed
        part[name] = leaf.value
    chunk_labels = {name: leaf.value for name, leaf in labels.items()}

    def chunk_value(trained: Layer, x: Array, chunk: Labels) -> Array:
        return loss(fixed | trained, x, chunk)

    value_and_grads = jax.value_and_grad(chunk_value, argnums=(0, 1))

    def add_chunk(carry: tuple[Array, Layer], xs: tuple[Array, Labels]) -> tuple[Any, Array]:
        x, chunk = xs

        def labeled() -> tuple[Any, Array]:
            total, d_layer = carry
            value, (d_chunk, d_x) = value_and_grads(trained, x, chunk)
            d_layer = jax.tree.map(lambda t, d: t + d.astype(t.dtype), d_layer, d_chunk)
            return (total + value, d_layer), d_x

        return lax.cond(_has_labels(chunk), labeled, lambda: (carry, jnp.zeros_like(x)))

    # Summed in float32, whatever the dtype of the leaves.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
    start = (jnp.zeros(()), zeros)
    chunks = (features.value, chunk_labels)
    (total, d_layer), d_features = lax.scan(add_chunk, start, chunks)
    # None for the leaves that do not train.
    d_leaves = dict.fromkeys(layer)
    for name, leaf in trained.items():
        d_leaves[name] = d_layer[name].astype(leaf.dtype)
    return total, (d_leaves, d_features)


def _has_labels(chunk: Labels) -> Array:
    return jnp.any(chunk["weights"] != 0)


def _fused_backward(loss: Callable[..., Array], residuals: Any, g: Array) -> tuple[Any, Any, None]:
    """The gradients of the forward pass, times the gradient g of the sum."""

    def scaled(d: Array) -> Array:
        product = g * d.astype(g.dtype)
        return product.astype(d.dtype)

    d_layer, d_features = jax.tree.map(scaled, residuals)
    return d_layer, d_features, None


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)
