"""The state that a run starts from: fresh adapters on a base, or a checkpoint's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from lorax_ft import sharding
from lorax_ft.config import USED_BY, AdapterConfig
from lorax_ft.lowrank.adapters import add_adapters, attach_adapters, kernel_shapes
from lorax_ft.lowrank.groups import fully_trained, partition
from lorax_ft.lowrank.linear import ADAPTER_LEAVES
from lorax_ft.lowrank.starts import CHANGES_BASE
from lorax_ft.lowrank.statistics import STATISTICS, needed_statistics
from lorax_ft.models.model import Model
from lorax_ft.quant.kernels import Quantized
from lorax_ft.run.checkpoints import Checkpoints
from lorax_ft.sharding import DECODER_RULES
from lorax_ft.training import contract
from lorax_ft.training.step import TrainState
from lorax_ft.tree import Tree, combine, flatten, modules, split, unflatten


def abstract_state(
    model: Model, config: AdapterConfig, tx: optax.GradientTransformation, *, mesh: Mesh
) -> tuple[TrainState, Tree]:
    """The shapes and shardings of a run's state and of its frozen leaves; nothing is computed.

    Args:
      model: its parameters may be shapes (`jax.ShapeDtypeStruct`).
      config: the adapters.
      tx: the optimizer of the trained leaves.
      mesh: the devices.
    """
    # What runs on the host cannot be traced; the shapes are those of any start that is taken out of the base.
    changes: Any = {"init": "olora"} | {
        f: getattr(AdapterConfig, f) for f in USED_BY if f != "keep_base"
    }
    traceable = dataclasses.replace(config, **changes) if config.init in CHANGES_BASE else config
    traceable = (
        dataclasses.replace(traceable, svd_iterations=0)
        if traceable.init in STATISTICS
        else traceable
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    base = flatten(model.params)
    quantized = {
        path: jax.eval_shape(lambda x: x, leaf)
        for path, leaf in base.items()
        if isinstance(leaf, Quantized)
    }
    plain = unflatten(
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in base.items()}
    )
    kernels = kernel_shapes(model.params, model.layout)
    needed = (
        {} if config.continue_from else needed_statistics(config, layout=model.layout, shapes=kernels)
    )

    def adapted(params: Tree, key: Array, statistics: Mapping[str, Array]) -> Tree:
        return _with_adapters(params, traceable, model=model, key=key, statistics=statistics)

    shapes = jax.eval_shape(adapted, plain, key, needed)
    shapes = unflatten(
        flatten(shapes) | quantized
    )  # whose starts are not traced either, but shaped as others are
    places = sharding.param_shardings(shapes, DECODER_RULES, mesh=mesh)
    chosen: dict[str, Any] = {"whole": config.train_whole, "freeze": config.freeze}
    trained, frozen = partition(jax.tree.map(_placed, shapes, places), **chosen)
    trained_places, _ = partition(places, **chosen)
    opt_places = sharding.state_shardings(tx, trained, trained_places, mesh=mesh)
    opt_state = jax.tree.map(_placed, jax.eval_shape(tx.init, trained), opt_places)
    step: Any = _placed(jax.ShapeDtypeStruct((), jnp.int32), sharding.replicated(mesh))
    return TrainState(step, trained, opt_state), frozen


def fresh_state(
    model: Model,
    config: AdapterConfig,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    key: Array,
    rounds: int = 1,
    statistics: Mapping[str, Any] = MappingProxyType({}),
    advance: Callable[[float], None] = lambda share: None,
) -> tuple[TrainState, Tree]:
    """The state of a run that begins, and its frozen leaves, each on its devices.

    Raises:
      ValueError: as `add_adapters`, or a scale is 0.
    """
    abstract, frozen_shapes = abstract_state(model, config, tx, mesh=mesh)
    params = _with_adapters(
        model.params,
        config,
        model=model,
        key=key,
        rounds=rounds,
        statistics=statistics,
        advance=advance,
    )
    contract.check_scales(params)
    contract.check_frozen(params, config.freeze)
    params = jax.tree.map(_move, params, combine(abstract.trained, frozen_shapes))
    trained, frozen = partition(params, whole=config.train_whole, freeze=config.freeze)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(tx.init, out_shardings=places)(trained)
    return TrainState(
        sharding.place(np.zeros((), np.int32), sharding.replicated(mesh)), trained, opt_state
    ), frozen


def resumed_state(
    model: Model,
    config: AdapterConfig,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    checkpoints: Checkpoints,
) -> tuple[TrainState, Tree]:
    """The state of the newest checkpoint, and the frozen leaves that belong to it.

    Raises:
      ValueError: there is no checkpoint, or it does not fit.
    """
    abstract, frozen = abstract_state(model, config, tx, mesh=mesh)
    state, owned = checkpoints.restore(abstract, owned_leaves(abstract.trained, frozen))
    base, _ = split(model.params, lambda path: path.rpartition("/")[2] not in ADAPTER_LEAVES)
    adapters, _ = split(
        combine(state.trained, owned), lambda path: path.rpartition("/")[2] in ADAPTER_LEAVES
    )
    params = attach_adapters(base, adapters, originals=model.originals)
    _, frozen = partition(params, whole=config.train_whole, freeze=config.freeze)
    return state, frozen


def owned_leaves(trained: Tree, frozen: Tree) -> Tree:
    """The frozen leaves that belong to the fine-tuning: scales, starts, factors that do not train."""
    owned, _ = partition(combine(trained, frozen), by="ownership")
    paths = flatten(trained)
    return split(owned, lambda path: path not in paths)[0]


def base_of(model: Model, state: TrainState, frozen: Tree) -> Model:
    """The model with the base that stands beside the adapters, so that no leaf is held twice."""
    base = flatten(model.params)
    params, _ = split(combine(state.trained, frozen), lambda path: path in base)
    return dataclasses.replace(model, params=params)


def _with_adapters(
    params: Tree, config: AdapterConfig, *, model: Model, key: Array, **given: Any
) -> Tree:
    """The parameters with adapters, unless they hold those to go on with; `given` is for `add_adapters`.

    Modules that train whole are float32, since bfloat16 rounds small updates away.
    """
    if config.continue_from is None:
        params = add_adapters(
            params, config, layout=model.layout, key=key, originals=model.originals, **given
        )
    both = [
        p
        for p, layer in modules(params).items()
        if "lora_a" in layer and fully_trained(p, config.train_whole)
    ]
    if both:
        raise ValueError(
            f"{both[0]} is meant by adapter.targets and by adapter.train_whole; give it to one of them"
        )
    trained, frozen = partition(params, whole=config.train_whole, freeze=config.freeze)
    return combine(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained), frozen)


def _placed(leaf: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _move(leaf: Array, target: Any) -> Array:
    if leaf.sharding == target.sharding:
        return leaf
    addressable = leaf.is_fully_addressable
    return (
        sharding.place(np.asarray(leaf), target.sharding)
        if addressable
        else jax.device_put(leaf, target.sharding)
    )
