"""The state of a training run: shapes first, then shardings, then values.

A new run, a resumed run and a plan without weights share the same path: `abstract_state` gives the
shape and the sharding of every leaf, and `fresh_state` or `resumed_state` computes the values.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from lorax_ft import sharding
from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.adapters import abstract_adapters, add_adapters, attach_adapters
from lorax_ft.lowrank.groups import adapter_leaves_of, fully_trained, partition
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.statistics import Statistics
from lorax_ft.lowrank.terms import is_adapted
from lorax_ft.models.model import LoadedModel
from lorax_ft.schema import is_base
from lorax_ft.training import contract
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, combine, flatten, modules, split


class Restore(Protocol):
    """Reads a checkpoint into the shapes and shardings of a state and of frozen adapter leaves."""

    def __call__(self, state: TrainState, owned: Tree) -> tuple[TrainState, Tree]:
        """The restored state and frozen leaves."""


def abstract_state(
    params: Tree,
    config: AdapterConfig,
    tx: optax.GradientTransformation,
    *,
    layout: Layout,
    mesh: Mesh,
) -> tuple[TrainState, Tree]:
    """The shapes and shardings of a state and of its frozen leaves; nothing is computed.

    Args:
      params: the model's parameters, or their shapes (`jax.ShapeDtypeStruct`); with the adapters to
        continue from, if there are any.
      config: the adapters.
      tx: the optimizer of the trained leaves.
      layout: the layers of the model.
      mesh: the devices.
    """
    trained, frozen = _abstract_leaves(params, config, layout=layout, mesh=mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, trained)
    opt_places = sharding.state_shardings(tx, trained, places, mesh=mesh)
    opt_state = jax.tree.map(_placed, jax.eval_shape(tx.init, trained), opt_places)
    step: Any = _placed(jax.ShapeDtypeStruct((), jnp.int32), sharding.replicated(mesh))
    return TrainState(step, trained, opt_state), frozen


def fresh_state(
    model: LoadedModel,
    config: AdapterConfig,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    key: Array,
    rounds: int = 1,
    statistics: Statistics = MappingProxyType({}),
    donate: bool = False,
    advance: Callable[[float], None] = lambda share: None,
) -> tuple[TrainState, Tree]:
    """The state of a new run, and its frozen leaves, each on its devices.

    The arguments are those of `add_adapters`.

    Raises:
      ValueError: as `fresh_leaves`.
    """
    trained, frozen = fresh_leaves(
        model,
        config,
        mesh=mesh,
        key=key,
        rounds=rounds,
        statistics=statistics,
        donate=donate,
        advance=advance,
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, trained)
    opt_places = sharding.state_shardings(tx, trained, places, mesh=mesh)
    # Jitted, so that each moment is made on its devices and never whole on one.
    opt_state = jax.jit(tx.init, out_shardings=opt_places)(trained)
    step = sharding.place(np.zeros((), np.int32), sharding.replicated(mesh))
    return TrainState(step, trained, opt_state), frozen


def fresh_leaves(
    model: LoadedModel,
    config: AdapterConfig,
    *,
    mesh: Mesh,
    key: Array,
    rounds: int = 1,
    statistics: Statistics = MappingProxyType({}),
    donate: bool = False,
    advance: Callable[[float], None] = lambda share: None,
) -> tuple[Tree, Tree]:
    """The leaves of a new run that train, and its frozen ones, each on its devices.

    Raises:
      ValueError: as `add_adapters`, or an adapter could never do anything.
    """
    abstract = _abstract_leaves(model.params, config, layout=model.layout, mesh=mesh)
    params = model.params
    if config.continue_from is None:
        params = add_adapters(
            params,
            config,
            layout=model.layout,
            key=key,
            originals=model.originals,
            rounds=rounds,
            statistics=statistics,
            donate=donate,
            advance=advance,
        )
    contract.check_active(params)
    contract.check_frozen(params, config.freeze)
    params = jax.tree.map(_moved, params, combine(*abstract))
    return _partition(params, config)


def resumed_state(
    model: LoadedModel,
    config: AdapterConfig,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    restore: Restore,
) -> tuple[TrainState, Tree]:
    """The state of a checkpoint, and the frozen leaves that belong to it.

    Raises:
      ValueError: there is no checkpoint, or it does not fit.
    """
    abstract, abstract_frozen = abstract_state(
        model.params, config, tx, layout=model.layout, mesh=mesh
    )
    state, owned = restore(abstract, owned_leaves(abstract.trained, abstract_frozen))
    base, _ = split(model.params, is_base)
    adapters = adapter_leaves_of(combine(state.trained, owned))
    params = attach_adapters(base, adapters, layout=model.layout, originals=model.originals)
    _, frozen = _partition(params, config)
    return state, frozen


def owned_leaves(trained: Tree, frozen: Tree) -> Tree:
    """The frozen leaves that belong to the fine-tuning: scales, starts, frozen factors."""
    owned, _ = partition(combine(trained, frozen), by="ownership")
    paths = flatten(trained)
    return split(owned, lambda path: path not in paths)[0]


def _abstract_leaves(
    params: Tree, config: AdapterConfig, *, layout: Layout, mesh: Mesh
) -> tuple[Tree, Tree]:
    """The shapes and shardings of the leaves that train, and of the frozen ones."""
    shapes = jax.tree.map(_shape, params)
    if config.continue_from is None:
        shapes = combine(shapes, abstract_adapters(config, params, layout=layout))
    _check_targets(shapes, config)
    _check_tied(shapes, config, layout)
    trained, frozen = _partition(shapes, config)
    trained = jax.tree.map(_float32, trained)
    places = sharding.param_shardings(
        combine(trained, frozen), sharding.DECODER_RULES, layout=layout, mesh=mesh
    )
    trained_places, frozen_places = _partition(places, config)
    trained = jax.tree.map(_placed, trained, trained_places)
    return trained, jax.tree.map(_placed, frozen, frozen_places)


def _partition(params: Tree, config: AdapterConfig) -> tuple[Tree, Tree]:
    """The leaves that train, and the frozen ones."""
    return partition(params, whole=config.train_whole, freeze=config.freeze)


def _check_targets(params: Tree, config: AdapterConfig) -> None:
    """Raise where a module is to be adapted and to train in full."""
    for path, layer in modules(params).items():
        if is_adapted(layer) and fully_trained(path, config.train_whole):
            raise ValueError(
                f"{path} is matched by adapter.targets and by adapter.train_whole; "
                "remove it from one of them"
            )


def _check_tied(params: Tree, config: AdapterConfig, layout: Layout) -> None:
    """Raise where a head without a weight of its own is named to train in full."""
    layers = modules(params)
    own = [path for path, layer in layers.items() if any(map(is_base, layer))]
    for path, spec in layout.items():
        if spec.tied_to is None or path in own:
            continue
        for pattern in config.train_whole:
            hits = [name for name in (path, *own) if fully_trained(name, (pattern,))]
            if hits == [path]:
                raise ValueError(
                    f"adapter.train_whole: {pattern!r} has no weight of its own, as it is tied to "
                    f"{spec.tied_to}; name {spec.tied_to} alone, which trains both"
                )


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _float32(leaf: Any) -> jax.ShapeDtypeStruct:
    """What trains is float32, since bfloat16 rounds small updates away."""
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)


def _placed(leaf: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _moved(leaf: Array, target: Any) -> Array:
    """The leaf in the dtype and on the devices of `target`."""
    if leaf.dtype != target.dtype:
        leaf = leaf.astype(target.dtype)
    if leaf.sharding == target.sharding:
        return leaf
    # Each process holds the whole leaf and provides its own shards.
    if leaf.is_fully_addressable:
        return sharding.place(np.asarray(leaf), target.sharding)
    return jax.device_put(leaf, target.sharding)
