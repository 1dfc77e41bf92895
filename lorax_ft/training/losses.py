"""Losses: functions `loss(params, batch, key) -> (sum, weight, metrics)` that the step minimizes.

Letters: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

from lorax_ft.lowrank.adapters import with_dropout
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.mlp import router_loss
from lorax_ft.models.model import CausalLM
from lorax_ft.training.head_loss import head_loss
from lorax_ft.tree import Tree

Batch = dict[str, Array]
Metrics = dict[str, Array]
Loss = Callable[[Tree, Batch, Array | None], tuple[Array, Array, Metrics]]
"""(params, batch, key) -> (Σ weight · loss, Σ weight, metrics, each a sum like the loss).

The key is None in evaluation, where nothing is random.
"""


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

    def is_real(batch: Batch) -> Array:
        """Neither padding, which has segment 0, nor a virtual token of a soft prompt."""
        return (batch["segment_ids"] > 0) & (batch["tokens"] < model.config.vocab_size)

    def loss(params: Tree, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        noise = None
        if key is not None:
            dropout_key = jax.random.fold_in(key, 0)
            params = with_dropout(params, dropout_key, rate=dropout)
            if neftune_alpha:
                noise = neftune(
                    jax.random.fold_in(key, 1),
                    jnp.where(is_real(batch), batch["segment_ids"], 0),
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
            counted=is_real(batch),
            active=model.active_tokens(params, batch["tokens"], segments),
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
        # Of a row's one sample too: an invocation is not looked for in its padding.
        active=model.active_tokens(params, batch["tokens"], batch["segment_ids"]),
    )
    return _batch_head_loss(model, params, features, batch, chunk_rows)


def _batch_head_loss(
    model: CausalLM, params: Tree, features: Array, batch: Batch, chunk_rows: int | None
) -> Array:
    """Σ weights · cross-entropy of the features of a batch."""
    head = model.head(params)
    # The virtual tokens of a soft prompt are no labels, but their ids would be out of bounds.
    targets = jnp.minimum(batch["targets"], model.config.vocab_size - 1)
    return head_loss(
        head,
        features,
        targets,
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
      segment_ids: `[B, T]`, 0 where there is to be no noise.
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
