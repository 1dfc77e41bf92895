"""Losses: functions `loss(params, batch, key) -> (sum, weight, metrics)` that the step minimizes.

The supervised one is a cross-entropy fused with the output head: full logits never exist, and are
computed once. Letters: B batch, T tokens, D width, V vocabulary, N chunks.
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

from lorax_ft.lowrank.adapters import with_dropout
from lorax_ft.lowrank.terms import dropout as dropout_term
from lorax_ft.mesh_axes import TOKEN_AXIS, dividing, row_devices, token_devices
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.mlp import router_loss
from lorax_ft.models.model import CausalLM
from lorax_ft.sharding import gather_inputs
from lorax_ft.tree import Layer, Tree

Batch = dict[str, Array]
Metrics = dict[str, Array]
Loss = Callable[[Tree, Batch, Array | None], tuple[Array, Array, Metrics]]
"""(params, batch, key) -> (Σ weight · loss, Σ weight, metrics, each a sum like the loss).

The key is None in evaluation, where nothing is random.
"""
Score = Callable[[Layer, Array], Array]
CHUNK_ROWS = 512  # tokens whose logits exist at once, on each device


def supervised_loss(
    model: CausalLM,
    *,
    packed: bool,
    dropout: float = 0.0,
    neftune_alpha: float = 0.0,
    router_aux_loss_coef: float = 0.0,
    chunk_rows: int | None = None,
) -> Loss:
    """The cross-entropy of the next token, over the labeled tokens.

    Args:
      model: whose functions are used.
      packed: whether rows hold several samples, none of which may attend to another.
      dropout: rate on the input of the adapter branch.
      neftune_alpha: strength of the noise on the embeddings.
      router_aux_loss_coef: weight of the router's load-balancing loss (`router_loss`) beside the
        mean cross-entropy. Padding does not count in it.
      chunk_rows: as in `head_loss`.

    Returns:
      The loss of a batch of `tokens`, `targets`, `weights`, `positions` and `segment_ids`, each
      `[B, T]`, as `lorax_ft.data.packing.collate` makes them. Its weight is the number of labeled
      tokens. Without a key there is neither dropout nor noise. With a `router_aux_loss_coef` its
      metrics have `router_loss`.

    Raises:
      ValueError: `router_aux_loss_coef` is given for a model without experts.
    """
    check_router_loss(model.config, router_aux_loss_coef, source="the model")

    def loss(params: Tree, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        noise = None
        if key is not None:
            dropout_key = jax.random.fold_in(key, 0)
            params = with_dropout(params, dropout_key, rate=dropout)
            if neftune_alpha:
                noise = neftune(
                    jax.random.fold_in(key, 1),
                    batch["segment_ids"],
                    alpha=neftune_alpha,
                    width=model.config.width,
                )
        weight = jnp.sum(batch["weights"])
        if not router_aux_loss_coef:
            value = batch_loss(
                model, params, batch, packed=packed, noise=noise, chunk_rows=chunk_rows
            )
            return value, weight, {}
        segments = batch["segment_ids"]
        features, usages = model.features_and_usage(
            params,
            batch["tokens"],
            batch["positions"],
            segments if packed else None,
            noise=noise,
            counted=segments > 0,  # segment 0 is padding
        )
        value = _batch_head_loss(model, params, features, batch, chunk_rows)
        # A mean over tokens, which the step divides by the weight as it does the cross-entropy.
        balance = weight * router_loss(usages)
        return value + router_aux_loss_coef * balance, weight, {"router_loss": balance}

    return loss


def check_router_loss(config: DecoderConfig, coef: float, *, source: str) -> None:
    """Raise if the load-balancing loss has a weight, but the model has no router.

    Args:
      config: the model's.
      coef: train.router_aux_loss_coef.
      source: names the model in the error.

    Raises:
      ValueError: it has none.
    """
    if coef and config.experts is None:
        raise ValueError(
            f"train.router_aux_loss_coef is {coef}, but {source} has no experts to balance; "
            "remove it"
        )


def batch_loss(
    model: CausalLM,
    params: Tree,
    batch: Batch,
    *,
    packed: bool,
    noise: Array | None = None,
    chunk_rows: int | None = None,
) -> Array:
    """Σ weights · cross-entropy over a batch `[B, T]`."""
    segments = batch["segment_ids"] if packed else None
    features, _ = model.features(
        params,
        batch["tokens"],
        batch["positions"],
        segments,
        noise=noise,
    )
    return _batch_head_loss(model, params, features, batch, chunk_rows)


def _batch_head_loss(
    model: CausalLM, params: Tree, features: Array, batch: Batch, chunk_rows: int | None
) -> Array:
    """Σ weights · cross-entropy of the features of a batch."""
    head = model.head(params)
    return head_loss(
        head,
        features,
        batch["targets"],
        batch["weights"],
        score=model.score,
        chunk_rows=chunk_rows,
    )


def neftune(
    key: Array,
    segment_ids: Array,
    *,
    alpha: float,
    width: int,
) -> Array:
    """U(−1, 1) · α / √(L D), with L each sample's true length; 0 on padding (2310.05914).

    Args:
      key: for the noise.
      segment_ids: `[B, T]`, 0 on padding.
      alpha: α.
      width: D.

    Returns:
      `[B, T, D]` float32.
    """
    chex.assert_rank(segment_ids, 2)
    batch, tokens = segment_ids.shape

    def lengths_of(row: Array) -> Array:
        counts = jnp.bincount(row, length=tokens + 1)  # by segment id
        return counts[row]

    lengths = jax.vmap(lengths_of)(segment_ids)  # [B, T]
    strength = alpha / jnp.sqrt(lengths * width)
    strength = jnp.where(segment_ids > 0, strength, 0.0)
    shape = (batch, tokens, width)
    noise = jax.random.uniform(key, shape, minval=-1, maxval=1)
    return noise * strength[..., None]


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
    labels: Batch,
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
    labels: Batch,
) -> Array:
    """The sum of `loss` over chunks `[N, B, t, ...]`."""

    def value_of(chunk: tuple[Array, Batch]) -> Array:
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

    def chunk_value(trained: Layer, x: Array, chunk: Batch) -> Array:
        return loss(fixed | trained, x, chunk)

    value_and_grads = jax.value_and_grad(chunk_value, argnums=(0, 1))

    def add_chunk(carry: tuple[Array, Layer], xs: tuple[Array, Batch]) -> tuple[Any, Array]:
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


def _has_labels(chunk: Batch) -> Array:
    return jnp.any(chunk["weights"] != 0)


def _fused_backward(loss: Callable[..., Array], residuals: Any, g: Array) -> tuple[Any, Any, None]:
    """The gradients of the forward pass, times the gradient g of the sum."""

    def scaled(d: Array) -> Array:
        product = g * d.astype(g.dtype)
        return product.astype(d.dtype)

    d_layer, d_features = jax.tree.map(scaled, residuals)
    return d_layer, d_features, None


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)
