"""The step and the evaluation of one run, vmapped over K adapters and compiled.

The base has no axis K: its products are those of a batch that is K times as large. Letters: K
adapters, M microbatches, B rows, T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import Mesh

from lorax_ft import sharding
from lorax_ft.config import Config
from lorax_ft.lowrank.groups import fully_trained
from lorax_ft.models.model import HEAD, Model
from lorax_ft.training.head_loss import CHUNK_ROWS
from lorax_ft.training.losses import supervised_loss
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.step import TrainState, make_eval_step, make_train_step
from lorax_ft.tree import Tree, combine, modules

SMALLEST_CHUNK = 64
"""Tokens of an adapter whose logits exist at once, at least."""


class Program(NamedTuple):
    """The compiled functions for K adapters."""

    step: Any
    """`step(state, owned, base, batch, keys) -> (state, metrics)`, with the state donated. The
    leaves of state and owned, and the metrics, are `[K, ...]`, the batch is `[K, M, B, T]`."""
    evaluate: Any
    """`evaluate(trained, owned, base, batch) -> (sums, weights)`, each `[K]`; jitted."""


def compile_program(
    model: Model,
    config: Config,
    *,
    steps: int,
    state: TrainState,
    owned: Tree,
    base: Tree,
    batch: dict[str, Array],
    keys: Array,
    mesh: Mesh,
    shares_validation: bool,
) -> Program:
    """The program of K adapters.

    Args:
      model: the model's functions.
      config: of any of the adapters; what it leaves to the state may differ between them.
      steps: the length of each run, which the schedule needs.
      state: of K adapters.
      owned: their frozen leaves `[K, ...]`.
      base: the frozen leaves that all share.
      batch: training rows `[K, M, B, T]`.
      keys: a key for each adapter `[K]`.
      mesh: the devices.
      shares_validation: whether all adapters are evaluated on the same rows `[B, T]`, or each on
        its own `[K, B, T]`.
    """
    (count,) = keys.shape
    # Its state holds the rates, which differ between adapters (`with_peak_rates`).
    tx = make_optimizer(config.optim, steps=steps)
    loss = supervised_loss(
        model,
        packed=config.data.pack,
        dropout=config.adapter.dropout,
        neftune_alpha=config.train.neftune_alpha,
        router_aux_loss_coef=config.train.router_aux_loss_coef,
        chunk_rows=_chunk_rows(config, state.trained, count, mesh),
    )
    solo_step = make_train_step(loss, tx, layout=model.layout)

    def step(
        state: TrainState,
        owned: Tree,
        base: Tree,
        batch: dict[str, Array],
        key: Array,
    ) -> Any:
        return solo_step(state, combine(base, owned), batch, key)

    # None: the base has no axis K.
    vmapped = jax.vmap(step, in_axes=(0, 0, None, 0, 0))
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    # Without out_shardings XLA may shard the new state differently, and the compiled step would
    # reject it at the next call.
    out_places = (places, sharding.replicated(mesh))
    jitted = jax.jit(vmapped, donate_argnums=0, out_shardings=out_places)
    # The model finds the mesh in the context when it constrains activations.
    with jax.set_mesh(mesh):
        compiled = jitted.lower(state, owned, base, batch, keys).compile()
    return Program(compiled, _evaluation(model, count, mesh, shares_rows=shares_validation))


def _evaluation(model: Model, count: int, mesh: Mesh, *, shares_rows: bool) -> Any:
    """The jitted evaluation; validation rows hold one sample each."""
    chunk_rows = _rows_of_each(count, mesh)
    loss = supervised_loss(model, packed=False, chunk_rows=chunk_rows)
    solo = make_eval_step(loss, layout=model.layout)

    def evaluate(trained: Tree, owned: Tree, base: Tree, batch: dict[str, Array]) -> Any:
        return solo(combine(base, owned, trained), batch)

    row_axis = None if shares_rows else 0
    vmapped = jax.vmap(evaluate, in_axes=(0, 0, None, row_axis))
    return jax.jit(vmapped)


def _chunk_rows(config: Config, trained: Tree, count: int, mesh: Mesh) -> int | None:
    """The tokens of an adapter whose logits exist at once; None: as many as in a run of its own."""
    head_trains = any(fully_trained(path, (HEAD,)) for path in modules(trained))
    # Dropout of the head draws anew for each chunk, so other chunks would be another run.
    if config.adapter.dropout and head_trains:
        return None
    return _rows_of_each(count, mesh)


def _rows_of_each(count: int, mesh: Mesh) -> int:
    """Each adapter's part of the rows whose logits a single run holds."""
    return max(CHUNK_ROWS // count, SMALLEST_CHUNK) * sharding.batch_devices(mesh)
