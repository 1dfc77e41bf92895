"""The training step: one pure function of state, frozen leaves, batch and key.

Letters: M microbatches, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lorax_ft.lowrank.adapters import norms, with_norms
from lorax_ft.lowrank.groups import label
from lorax_ft.lowrank.layout import Layout
from lorax_ft.training.losses import Batch, Loss, Metrics
from lorax_ft.training.optimizer import learning_rates
from lorax_ft.tree import Tree, combine, flatten


class TrainState(NamedTuple):
    """What an update changes."""

    step: Array
    """Updates made so far, int32."""
    trained: Tree
    """The leaves that train."""
    opt_state: Any
    """The optimizer's state."""


TrainStep = Callable[[TrainState, Tree, Batch, Array], tuple[TrainState, Metrics]]


def make_train_step(loss: Loss, tx: optax.GradientTransformation, *, layout: Layout) -> TrainStep:
    """The step `train_step(state, frozen, batch, key) -> (state, metrics)`.

    Jit it with the state donated, or vmap it over states that differ in rates, scales or seeds.

    Args:
      loss: `loss(params, batch, key) -> (sum, weight, metrics)`, such as `supervised_loss`. The
        step minimizes Σ sum / Σ weight over the microbatches.
      tx: the optimizer of the trained leaves.
      layout: the layers of the model.

    Returns:
      The step. Every array of its batch is `[M, ...]`; the microbatches are scanned, and each
      counts by its own weight. Metrics: `loss`, those of the loss (also Σ metric / Σ weight),
      `weight` (Σ weight), `grad_norm` (before clipping), the learning rate of each group, and
      `skipped`: 1 where the loss or a gradient is not finite or the weight is 0, else 0. Such a
      step changes nothing but the number of the step: no leaf, moment or count.
    """

    def total(
        trained: Tree,
        frozen: Tree,
        batch: Batch,
        key: Array,
    ) -> tuple[Array, Any]:
        params = combine(trained, frozen)
        value, weight, metrics = loss(params, batch, key)
        metrics = metrics | {"loss": value}
        return value, {"weight": weight, "metrics": metrics}

    def train_step(
        state: TrainState,
        frozen: Tree,
        batch: Batch,
        key: Array,
    ) -> tuple[TrainState, Metrics]:
        # A run that resumes at this step draws the same noise.
        key = jax.random.fold_in(key, state.step)
        # What depends on the adapters alone is computed once for all microbatches. It is a constant
        # for the gradient.
        params = combine(state.trained, frozen)
        frozen = combine(frozen, norms(params, layout=layout))
        grad = jax.grad(total, has_aux=True)

        def microbatch(i: Array | int, rows: Batch) -> tuple[Tree, Any]:
            row_key = jax.random.fold_in(key, i)
            return grad(state.trained, frozen, rows, row_key)

        grads, sums = _summed(microbatch, batch)
        weight = sums["weight"]
        # A batch without any weight has a loss and gradients of 0, and must not divide by zero.
        divisor = jnp.where(weight != 0, weight, 1)
        grads = jax.tree.map(lambda g: (g / divisor).astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics = {name: value / divisor for name, value in sums["metrics"].items()}
        metrics["weight"] = weight
        metrics["grad_norm"] = optax.tree.norm(grads)
        # The norm is finite only if every gradient is.
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        learns = is_finite & (weight != 0)
        metrics["skipped"] = 1.0 - learns.astype(jnp.float32)
        # Not `optax.apply_if_finite`: it does not see the loss, and takes the bad update in the
        # end. A choice of each element is fused with the update, where its branches are not.
        trained, opt_state = _chosen(
            learns, (trained, opt_state), otherwise=(state.trained, state.opt_state)
        )
        metrics |= _rates(state.trained, opt_state)
        return TrainState(state.step + 1, trained, opt_state), metrics

    return train_step


def make_eval_step(loss: Loss, *, layout: Layout) -> Callable[[Tree, Batch], tuple[Array, Array]]:
    """A function of the parameters and a batch: the summed loss and its weight, without noise."""

    def eval_step(params: Tree, batch: Batch) -> tuple[Array, Array]:
        params = with_norms(params, layout=layout)
        # Without a key there is neither dropout nor noise.
        value, weight, _ = loss(params, batch, None)
        return value, weight

    return eval_step


def _chosen(condition: Array, tree: Any, *, otherwise: Any) -> Any:
    """The leaves of one tree or of the other."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), tree, otherwise)


def _rates(trained: Tree, opt_state: Any) -> Metrics:
    """The learning rate of each group of leaves in the last update."""
    labels = label(trained, whole=("all",))
    groups = set(flatten(labels).values())
    rates = learning_rates(opt_state, groups)
    return {f"learning_rate/{group}": rate for group, rate in rates.items()}


def _summed(microbatch: Callable[[Any, Batch], Any], batch: Batch) -> Any:
    """The sum of `microbatch(i, rows)` over the first axis of the batch."""
    first_leaf, *_ = jax.tree.leaves(batch)
    count = len(first_leaf)
    first = jax.tree.map(lambda rows: rows[0], batch)
    if count == 1:
        return microbatch(0, first)

    def add(sums: Any, numbered: tuple[Array, Batch]) -> tuple[Any, None]:
        i, rows = numbered
        sums = jax.tree.map(jnp.add, sums, microbatch(i, rows))
        return sums, None

    # Summed in the carry, so that the gradients of one microbatch exist at a time.
    shapes = jax.eval_shape(microbatch, 0, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    indices = jnp.arange(count)
    sums, _ = jax.lax.scan(add, zeros, (indices, batch))
    return sums
