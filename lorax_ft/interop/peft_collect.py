"""Collecting what a PEFT folder holds: the adapters, and the modules trained in full."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.interop.huggingface import unstacked
from lorax_ft.interop.peft_methods import Matrix, method_of_matrix
from lorax_ft.lowrank.groups import fully_trained
from lorax_ft.lowrank.requantize import is_requantized
from lorax_ft.lowrank.spec import base_kernel
from lorax_ft.lowrank.terms import active_leaf, check_layer, is_adapted, kept_start
from lorax_ft.models.model import HEAD, TABLE, LoadedModel, Model
from lorax_ft.program import command, either
from lorax_ft.quant.kernels import Quantized
from lorax_ft.schema import is_adapter, is_base
from lorax_ft.tree import Layer, Tree, modules

Layers = Mapping[str, Layer]


def collect_adapters(
    params: Tree,
    model: Model,
    config: AdapterConfig | None,
    *,
    base: str | Path | None = None,
) -> tuple[dict[str, Matrix], dict[str, np.ndarray]]:
    """The adapters by logical path, and the fully trained weights by logical slash path.

    Raises:
      ValueError: as `save_peft`, where PEFT has no form for what was trained, or `base` is needed.
    """
    layers = modules(params)
    requantized = [path for path, layer in layers.items() if is_requantized(layer)]
    if base is None and requantized:
        way_out = either(
            "write it with save_quantized and give its folder as base, or start with keep_base",
            "--target hf writes the merged model; or train with --adapter.keep_base",
        )
        raise ValueError(
            f"{requantized[0]} was quantized without its start, so its adapter works on that base "
            f"alone: {way_out}"
        )
    adapters: dict[str, Matrix] = {}
    whole: dict[str, np.ndarray] = {}
    for path, layer in layers.items():
        check_layer(layer, path)
        changed = _changed_weights(path, layer, model, config)
        # PEFT trains the biases of adapted modules too, if asked to (bias="lora_only").
        has_biases_alone = "lora_a" in layer and all(name.endswith("/bias") for name in changed)
        if not is_adapted(layer) or has_biases_alone:
            whole |= changed
        if not is_adapted(layer):
            continue
        if changed and not has_biases_alone:
            raise ValueError(
                f"{path} is adapted and its own weights changed too; PEFT supports one of the two"
            )
        adapters |= _adapters_of_stack(path, layer, base_without_start=base is not None)
    has_own_head = "kernel" in layers.get(HEAD, {})
    if f"{TABLE}/embedding" in whole and model.config.tied and not has_own_head:
        # PEFT unties a table that it trains in full.
        whole[f"{HEAD}/kernel"] = whole[f"{TABLE}/embedding"]
    _check(adapters, whole)
    return adapters, whole


def differ(leaf: Array, old: Array, index: tuple[int, ...] = ()) -> bool:
    """Whether a leaf, at an index of its stack, is another than before."""
    if leaf is old:
        return False
    # An array that was donated to a step that trained it cannot be read again.
    if isinstance(old, Array) and old.is_deleted():
        return True
    before = old[index].astype(leaf.dtype)
    return not jnp.array_equal(leaf[index], before)


def _changed_weights(
    path: str,
    layer: Layer,
    model: Model,
    config: AdapterConfig | None,
) -> dict[str, np.ndarray]:
    """The layer's own weights where they were trained, in PEFT's orientation, by logical path."""
    if config is not None and not fully_trained(path, config.train_whole):
        return {}
    if config is None and kept_start.is_in_base(layer):  # the init changed them
        return {}
    if config is None and not isinstance(model, LoadedModel):
        raise ValueError(
            "without config= the weights are compared with the model's own; give a "
            "model from load_model, or the config that the adapters were made from"
        )
    own = {}
    for name, leaf in layer.items():
        if is_base(name) and not isinstance(leaf, Quantized):  # quantized weights never train
            own[name] = leaf
    changed = {}
    for logical, index in unstacked(path, next(iter(own.values())).shape) if own else ():
        names = []
        for name, leaf in own.items():
            if config is not None or differ(leaf, _original(path, name, model), index):
                names.append(name)
        # PEFT knows biases that train alone, and modules of which all trains.
        saved = names if names in ([], ["bias"]) else own
        for name in saved:
            value = np.asarray(own[name][index])
            if name == "kernel":
                value = value.T  # torch's Linear has [out, in]
            changed[f"{logical}/{name}"] = value
    return changed


def _original(path: str, name: str, model: Model) -> Array:
    """A leaf of the model's own; a head that was untied had the table."""
    assert isinstance(model, LoadedModel)
    own = modules(model.params)
    if name in own.get(path, {}):
        return own[path][name]
    kernel = base_kernel(own, path, model.layout[path])
    assert not isinstance(kernel, Quantized)
    return kernel


def _adapters_of_stack(path: str, layer: Layer, *, base_without_start: bool) -> dict[str, Matrix]:
    """The adapters of a stack, by logical path, without those of matrices that are not adapted."""
    leaves = {name: np.asarray(leaf) for name, leaf in layer.items() if is_adapter(name)}
    active = leaves[active_leaf(layer)]
    adapters = {}
    for logical, index in unstacked(path, active.shape):
        if active[index] != 0:
            matrix = {name: leaf[index] for name, leaf in leaves.items()}
            export = method_of_matrix(matrix).export
            adapters[logical] = export(matrix, base_without_start)
    return adapters


def _check(adapters: dict[str, Matrix], whole: dict[str, np.ndarray]) -> None:
    """Raise where PEFT has no form for what was collected."""
    if not adapters:
        writer = either("save_model", f"{command('export')} --target hf")
        raise ValueError(f"the parameters hold no adapter; {writer} writes whole models")
    for path in sorted(whole):
        parent, _, leaf = path.rpartition("/")
        has_lora = "lora_a" in adapters.get(parent, {})
        if parent in adapters and not (leaf == "bias" and has_lora):
            raise ValueError(
                f"{path} is trained in full and its module is adapted; PEFT supports one of the two"
            )
    if len({method_of_matrix(matrix).peft_type for matrix in adapters.values()}) > 1:
        raise ValueError("the adapters are of several types; PEFT needs one")
