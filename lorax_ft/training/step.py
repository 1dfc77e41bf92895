"""The training step: one pure function of state, frozen leaves, batch and key.

Letters: M microbatches, B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lorax_ft.lowrank.adapters import norms, with_dropout, with_norms
from lorax_ft.models.model import Model
from lorax_ft.training.losses import head_loss
from lorax_ft.training.optimizer import learning_rates
from lorax_ft.tree import Tree, combine, flatten

Batch = dict[str, Array]
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """What an update changes."""

    step: Array
    """Updates made so far, int32."""
    trained: Tree
    """The leaves that train."""
    opt_state: Any
    """The optimizer's state."""


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    packed: bool,
    dropout: float = 0.0,
    neftune_alpha: float = 0.0,
) -> Callable[[TrainState, Tree, Batch, Array], tuple[TrainState, Metrics]]:
    """The step `train_step(state, frozen, batch, key) -> (state, metrics)`, to be jitted with the state donated.

    Args:
      model: whose functions are used; its parameters are not.
      tx: the optimizer of the trained leaves.
      packed: whether rows hold several samples, none of which attends to another.
      dropout: rate on the adapter branch's input.
      neftune_alpha: strength of the noise on the embeddings.

    Returns:
      The step. Its batch is `[M, B, T]`; microbatches are scanned, and a token weighs the same in whichever
      it stands. Metrics: loss (mean over the labeled tokens), grad_norm (before clipping), tokens, and
      the learning rate of each group.
    """

    def loss(trained: Tree, frozen: Tree, batch: Batch, key: Array, total: Array) -> Array:
        params = with_dropout(combine(trained, frozen), jax.random.fold_in(key, 0), rate=dropout)
        noise = None
        if neftune_alpha:
            width = model.config.width
            noise = neftune(
                jax.random.fold_in(key, 1), batch["segment_ids"], alpha=neftune_alpha, width=width
            )
        return batch_loss(model, params, batch, packed=packed, noise=noise) / total

    def train_step(
        state: TrainState, frozen: Tree, batch: Batch, key: Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        total = jnp.maximum(jnp.sum(batch["weights"]), 1)
        # What depends on the adapters alone is computed once for all microbatches; it is a constant for the gradient.
        frozen = combine(frozen, norms(combine(state.trained, frozen)))
        grad = jax.value_and_grad(loss)

        def accumulate(
            sums: tuple[Array, Tree], xs: tuple[Batch, Array]
        ) -> tuple[tuple[Array, Tree], None]:
            microbatch, i = xs
            part = grad(state.trained, frozen, microbatch, jax.random.fold_in(key, i), total)
            return jax.tree.map(jnp.add, sums, part), None

        m = batch["tokens"].shape[0]
        if m == 1:
            value, grads = grad(
                state.trained,
                frozen,
                {k: v[0] for k, v in batch.items()},
                jax.random.fold_in(key, 0),
                total,
            )
        else:
            zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trained))
            (value, grads), _ = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(m)))
        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {"loss": value, "grad_norm": optax.global_norm(grads), "tokens": total}
        metrics |= {
            f"learning_rate/{group}": rate
            for group, rate in learning_rates(opt_state, _groups(state.trained)).items()
        }
        return TrainState(state.step + 1, trained, opt_state), metrics

    return train_step


def make_eval_step(model: Model, *, packed: bool) -> Callable[[Tree, Batch], tuple[Array, Array]]:
    """A function of the parameters and a batch `[B, T]`: the summed loss and the number of labeled tokens."""

    def eval_step(params: Tree, batch: Batch) -> tuple[Array, Array]:
        return batch_loss(model, with_norms(params), batch, packed=packed), jnp.sum(
            batch["weights"]
        )

    return eval_step


def batch_loss(
    model: Model, params: Tree, batch: Batch, *, packed: bool, noise: Array | None = None
) -> Array:
    """Σ weights · cross-entropy over a batch `[B, T]`."""
    segments = batch["segment_ids"] if packed else None
    features, _ = model.features(params, batch["tokens"], batch["positions"], segments, noise=noise)
    return head_loss(
        model.head(params), features, batch["targets"], batch["weights"], score=model.score
    )


def neftune(key: Array, segment_ids: Array, *, alpha: float, width: int) -> Array:
    """U(−1, 1) · α / √(L D), with L each sample's true length; 0 on padding (2310.05914).

    Args:
      key: for the noise.
      segment_ids: `[B, T]`, 0 on padding.
      alpha: α.
      width: D.

    Returns:
      `[B, T, D]` float32.
    """
    tokens = segment_ids.shape[1]
    lengths = jax.vmap(lambda row: jnp.bincount(row, length=tokens + 1)[row])(segment_ids)  # [B, T]
    strength = jnp.where(segment_ids > 0, alpha / jnp.sqrt(lengths * width), 0.0)
    return (
        jax.random.uniform(key, (*segment_ids.shape, width), minval=-1, maxval=1)
        * strength[..., None]
    )


def _groups(trained: Tree) -> set[str]:
    names = {path.rpartition("/")[2] for path in flatten(trained)}
    adapters = names & {"lora_a", "lora_b", "magnitude"}
    return adapters | ({"weight"} if names - adapters else set())
