"""The state that a run starts from: fresh adapters on a base, or a checkpoint's."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.adapters import add_adapters, attach_adapters
from lorax_ft.lowrank.groups import is_whole, partition
from lorax_ft.lowrank.linear import ADAPTER_LEAVES
from lorax_ft.models.decoder import SHARDING_RULES
from lorax_ft.models.model import Model
from lorax_ft.training import contract, sharding
from lorax_ft.training.checkpoints import Checkpoints
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, combine, flatten, modules, split


def abstract_state(
    model: Model, config: AdapterConfig, tx: optax.GradientTransformation, *, mesh: Mesh
) -> tuple[TrainState, Tree]:
    """The shapes and shardings of a run's state and of its frozen leaves; nothing is computed.

    Args:
      model: its parameters may be shapes (`jax.ShapeDtypeStruct`).
      config: the adapters.
      tx: the optimiser of the trained leaves.
      mesh: the devices.
    """
    # The exact SVD runs on the host and cannot be traced; the shapes are the same.
    traceable = dataclasses.replace(config, pissa_iterations=0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda p, k: _with_adapters(p, traceable, model=model, key=k), model.params, key)
    places = sharding.param_shardings(shapes, SHARDING_RULES, mesh=mesh)
    trained, frozen = partition(jax.tree.map(_placed, shapes, places), whole=config.train_whole)
    trained_places, _ = partition(places, whole=config.train_whole)
    opt_places = sharding.state_shardings(tx, trained, trained_places, mesh=mesh)
    opt_state = jax.tree.map(_placed, jax.eval_shape(tx.init, trained), opt_places)
    step: Any = _placed(jax.ShapeDtypeStruct((), jnp.int32), sharding.replicated(mesh))
    return TrainState(step, trained, opt_state), frozen


def fresh_state(
    model: Model, config: AdapterConfig, tx: optax.GradientTransformation, *, mesh: Mesh, key: Array
) -> tuple[TrainState, Tree]:
    """The state of a run that begins, and its frozen leaves, each on its devices.

    Raises:
      ValueError: as `add_adapters`, or a scale is 0.
    """
    abstract, frozen_shapes = abstract_state(model, config, tx, mesh=mesh)
    params = _with_adapters(model.params, config, model=model, key=key)
    contract.check_scales(params)
    params = jax.tree.map(_move, params, combine(abstract.trained, frozen_shapes))
    trained, frozen = partition(params, whole=config.train_whole)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(tx.init, out_shardings=places)(trained)
    return TrainState(sharding.place(np.zeros((), np.int32), sharding.replicated(mesh)), trained, opt_state), frozen


def resumed_state(
    model: Model, config: AdapterConfig, tx: optax.GradientTransformation, *, mesh: Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, Tree]:
    """The state of the newest checkpoint, and the frozen leaves that belong to it.

    Raises:
      ValueError: there is no checkpoint, or it does not fit.
    """
    abstract, frozen = abstract_state(model, config, tx, mesh=mesh)
    state, owned = checkpoints.restore(abstract, owned_leaves(abstract.trained, frozen))
    base, _ = split(model.params, lambda path: path.rpartition("/")[2] not in ADAPTER_LEAVES)
    adapters, _ = split(combine(state.trained, owned), lambda path: path.rpartition("/")[2] in ADAPTER_LEAVES)
    _, frozen = partition(attach_adapters(base, adapters), whole=config.train_whole)
    return state, frozen


def owned_leaves(trained: Tree, frozen: Tree) -> Tree:
    """The frozen leaves that belong to the fine-tuning: scales and starts."""
    owned, _ = partition(combine(trained, frozen), by="ownership")
    paths = flatten(trained)
    return split(owned, lambda path: path not in paths)[0]


def base_of(model: Model, state: TrainState, frozen: Tree) -> Model:
    """The model with the base that stands beside the adapters, so that no leaf is held twice."""
    base = flatten(model.params)
    params, _ = split(combine(state.trained, frozen), lambda path: path in base)
    return dataclasses.replace(model, params=params)


def _with_adapters(params: Tree, config: AdapterConfig, *, model: Model, key: Array) -> Tree:
    """The parameters with adapters, unless they hold those to go on with.

    Modules that train whole are float32, since bfloat16 rounds small updates away.
    """
    if config.start_from is None:
        params = add_adapters(params, config, layout=model.layout, key=key)
    both = [p for p, layer in modules(params).items() if "lora_a" in layer and is_whole(p, config.train_whole)]
    if both:
        raise ValueError(f"{both[0]} is meant by adapter.targets and by adapter.train_whole; give it to one of them")
    trained, frozen = partition(params, whole=config.train_whole)
    return combine(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained), frozen)


def _placed(leaf: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _move(leaf: Array, target: Any) -> Array:
    if leaf.sharding == target.sharding:
        return leaf
    addressable = leaf.is_fully_addressable
    return sharding.place(np.asarray(leaf), target.sharding) if addressable else jax.device_put(leaf, target.sharding)
