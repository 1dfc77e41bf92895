"""Cross-entropy fused with the output head: full logits never exist, and are computed once.

Letters: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.lowrank.linear import Layer
from lorax_ft.sharding import row_devices

Labels = dict[str, Array]
Score = Callable[[Layer, Array], Array]
CHUNK_ROWS = 1024  # tokens whose logits exist at once, on each device


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

    The gradient to the features, and to those leaves of the head that train, is computed in the forward
    pass beside the loss, so that logits are neither kept nor computed twice.

    Args:
      layer: the head: kernel `[D, V]` and its adapter.
      features: `[B, T, D]`.
      targets: `[B, T]`, the next tokens.
      weights: `[B, T]` float32; 0 leaves a token out.
      score: the logits `[..., V]` of a head and features `[..., D]`.
      chunk_rows: tokens in a chunk; a chunk takes 4 · chunk_rows · V bytes. None: `CHUNK_ROWS` a device of the
        ambient mesh that has rows of its own.

    Returns:
      A float32 scalar, the sum.
    """
    batch, tokens = targets.shape
    chunk_rows = chunk_rows or CHUNK_ROWS * row_devices()
    chunks = min(math.ceil(batch * tokens / chunk_rows), tokens)
    more = -tokens % chunks  # tokens of weight 0, as the chunks are of one size
    features, targets, weights = (
        jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))
        for x in (features, targets, weights)
    )
    labels = {
        "targets": _split(targets, chunks),
        "weights": _split(weights, chunks),
        "chunk": jnp.arange(chunks),
    }
    return _fused(functools.partial(_chunk_loss, score), layer, _split(features, chunks), labels)


def _chunk_loss(score: Score, layer: Layer, features: Array, labels: Labels) -> Array:
    """Σ w (log Σ exp z − z_target) of one chunk, in float32."""
    if "dropout_key" in layer:  # each chunk drops other features
        layer = layer | {"dropout_key": jax.random.fold_in(layer["dropout_key"], labels["chunk"])}
    logits = score(layer, features).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(labels["weights"] * (jax.nn.logsumexp(logits, axis=-1) - picked))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(loss: Callable[..., Array], layer: Layer, features: Array, labels: Labels) -> Array:
    """The sum of `loss` over chunks `[N, B, t, ...]`."""
    return jnp.sum(lax.map(lambda chunk: loss(layer, *chunk), (features, labels)))


def _fused_forward(
    loss: Callable[..., Array], layer: Any, features: Any, labels: Any
) -> tuple[Array, Any]:
    trained = {name: leaf.value for name, leaf in layer.items() if leaf.perturbed}
    fixed = {name: leaf.value for name, leaf in layer.items() if not leaf.perturbed}
    labels = {name: leaf.value for name, leaf in labels.items()}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)

    def chunk(
        total: tuple[Array, Layer], xs: tuple[Array, Labels]
    ) -> tuple[tuple[Array, Layer], Array]:
        x, y = xs
        value, (d_layer, d_x) = jax.value_and_grad(
            lambda l, x: loss(fixed | l, x, y), argnums=(0, 1)
        )(trained, x)
        return (
            total[0] + value,
            jax.tree.map(lambda t, d: t + d.astype(t.dtype), total[1], d_layer),
        ), d_x

    (total, d_layer), d_features = lax.scan(chunk, (jnp.zeros(()), zeros), (features.value, labels))
    d_layer = {
        name: d_layer[name].astype(trained[name].dtype) if name in trained else None
        for name in layer
    }
    return total, (d_layer, d_features)


def _fused_backward(loss: Callable[..., Array], residuals: Any, g: Array) -> tuple[Any, Any, None]:
    d_layer, d_features = jax.tree.map(lambda d: (g * d.astype(g.dtype)).astype(d.dtype), residuals)
    return d_layer, d_features, None


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


def _split(x: Array, chunks: int) -> Array:
    """`[B, T, ...]` as chunks `[N, B, T / N, ...]`: rows stay whole, so that a sharded batch stays in place."""
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, x.shape[1] // chunks, *x.shape[2:]), 1, 0)
