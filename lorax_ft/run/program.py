"""The compiled programs of a run: its training step and its evaluation."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax import Array
from jax.sharding import Mesh

from lorax_ft import sharding
from lorax_ft.config import Config
from lorax_ft.lowrank.adapters import with_norms
from lorax_ft.models.model import CausalLM, Model
from lorax_ft.training import contract
from lorax_ft.training.losses import batch_loss, supervised_loss
from lorax_ft.training.step import TrainState, make_eval_step, make_train_step
from lorax_ft.tree import Tree, combine


def compile_step(
    model: Model,
    tx: optax.GradientTransformation,
    config: Config,
    *,
    state: TrainState,
    frozen: Tree,
    batch: dict[str, Array],
    mesh: Mesh,
) -> Any:
    """The training step, compiled for this state and for batches of this shape.

    Raises:
      ValueError: the loss does not read a leaf that trains.
    """
    check_contract(model, state, frozen, batch=batch, packed=config.data.pack)
    traced = trace_step(
        model, tx, config, state=state, frozen=frozen, batch=batch, key=step_key(config), mesh=mesh
    )
    with jax.set_mesh(mesh):
        return traced.lower().compile()


def trace_step(
    model: CausalLM,
    tx: optax.GradientTransformation,
    config: Config,
    *,
    state: TrainState,
    frozen: Tree,
    batch: dict[str, Array],
    key: Array,
    mesh: Mesh,
) -> Any:
    """The jitted training step, traced for these arguments, or for their shapes and shardings."""
    loss = supervised_loss(
        model,
        packed=config.data.pack,
        dropout=config.adapter.dropout,
        neftune_alpha=config.train.neftune_alpha,
        router_aux_loss_coef=config.train.router_aux_loss_coef,
    )
    train_step = make_train_step(loss, tx, layout=model.layout)
    # Without out_shardings XLA may shard the new state differently, and the compiled step
    # would reject it at the next call.
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    out_shardings = (state_shardings, sharding.replicated(mesh))
    jitted = jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
    # The model finds the mesh in the context when it constrains activations (`split_tokens`).
    with jax.set_mesh(mesh):
        return jitted.trace(state, frozen, batch, key)


def jitted_evaluation(model: Model) -> Any:
    """The jitted evaluation; validation rows hold one sample each."""
    loss = supervised_loss(model, packed=False)
    return jax.jit(make_eval_step(loss, layout=model.layout))


def step_key(config: Config) -> Array:
    """The key that each step folds its number into, for dropout and noise."""
    return jax.random.fold_in(jax.random.key(config.train.seed), 1)


def check_contract(
    model: Model, state: TrainState, frozen: Tree, *, batch: dict[str, Array], packed: bool
) -> None:
    """Raise if the loss does not read every trained leaf."""
    # The loss takes one microbatch: [M, B, T] becomes [B, T].
    microbatch = {name: values[0] for name, values in batch.items()}

    def loss(trained: Tree) -> Array:
        params = with_norms(combine(trained, frozen), layout=model.layout)
        return batch_loss(model, params, microbatch, packed=packed)

    contract.check_read(loss, state.trained)
