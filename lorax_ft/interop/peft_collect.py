"""What of a parameter tree goes into a PEFT folder: the adapters, and the modules trained whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_ft.config import AdapterConfig
from lorax_ft.interop.huggingface import unstacked
from lorax_ft.lowrank.groups import fully_trained
from lorax_ft.lowrank.linear import ADAPTER_LEAVES, STEP_LEAVES, Layer
from lorax_ft.lowrank.requantize import is_requantized
from lorax_ft.models.model import Model
from lorax_ft.quant.kernels import Quantized
from lorax_ft.tree import Tree, modules

Layers = Mapping[str, Layer]
Matrix = dict[str, np.ndarray]
"""The adapter of one layer of a stack."""


def collect_adapters(
    params: Tree, model: Model, config: AdapterConfig | None, *, base: str | Path | None = None
) -> tuple[dict[str, Matrix], dict[str, np.ndarray]]:
    """The adapters by logical path, and the weights trained whole by logical slash path, as `save_peft` writes them.

    Raises:
      ValueError: as `save_peft`, where PEFT has no form for what was trained, or `base` is needed.
    """
    layers, own = modules(params), modules(model.params)
    if base is None and (lost := [path for path, layer in layers.items() if is_requantized(layer)]):
        raise ValueError(
            f"save_peft: {lost[0]} was quantized without its start, so its adapter is for that base alone: write it "
            "with save_quantized and give its folder as base, or start with keep_base"
        )
    adapters: dict[str, Matrix] = {}
    whole: dict[str, np.ndarray] = {}
    for path, layer in layers.items():
        changed = _changed(path, layer, own, config)
        if "lora_a" not in layer:
            whole |= changed
        elif changed:
            raise ValueError(
                f"save_peft: {path} is adapted and its own weights changed too; PEFT has no form for it"
            )
        else:
            adapters |= _exported(path, layer, in_base=base is not None)
    if (
        "embed_tokens/embedding" in whole
        and "lm_head" not in own
        and "kernel" not in layers.get("lm_head", {})
    ):
        whole["lm_head/kernel"] = whole[
            "embed_tokens/embedding"
        ]  # PEFT unties a table that it trains whole
    _check(adapters, whole)
    return adapters, whole


def base_kernel(layers: Layers, path: str) -> Array:
    """The base weight at `path`; a tied head's is the table, transposed."""
    layer = layers.get(path, {})
    if path == "lm_head" and "kernel" not in layer:
        return table(layers)
    return next(layer[name] for name in ("kernel", "embedding") if name in layer)


def table(layers: Layers) -> Array:
    """The embedding table as an output head's kernel."""
    return layers["embed_tokens"]["embedding"].T


def differ(leaf: Array, old: Array, index: tuple[int, ...] = ()) -> bool:
    """Whether a leaf, at an index of its stack, is another than before."""
    if leaf is old:
        return False
    donated = isinstance(old, Array) and old.is_deleted()  # by a step that trained it
    return donated or not jnp.array_equal(leaf[index], old[index].astype(leaf.dtype))


def _changed(
    path: str, layer: Layer, base: Layers, config: AdapterConfig | None
) -> dict[str, np.ndarray]:
    """The layer's own weights where they were trained, in PEFT's orientation, by logical slash path."""
    if config is not None and not fully_trained(path, config.train_whole):
        return {}
    if (
        config is None and "lora_a0" in layer and "start_scale" not in layer
    ):  # the init changed them
        return {}
    changed = {}
    for name in [name for name in layer if name not in ADAPTER_LEAVES | STEP_LEAVES]:
        leaf = layer[name]
        if isinstance(leaf, Quantized):  # which never trains
            continue
        old = base[path][name] if path in base else base_kernel(base, path)
        for logical, index in unstacked(path, leaf.shape):
            if config is not None or differ(leaf, old, index):
                value = np.asarray(leaf[index])
                changed[f"{logical}/{name}"] = value.T if name == "kernel" else value
    return changed


def _exported(path: str, layer: Layer, *, in_base: bool) -> dict[str, Matrix]:
    """The adapters of a stack, by logical path, without padding.

    The start becomes columns of their own, unless the base that goes with them is without it.
    """
    leaves = {name: np.asarray(layer[name]) for name in ADAPTER_LEAVES & layer.keys()}
    subtracted = "lora_a0" in layer and ("start_scale" in layer or not in_base)
    adapters = {}
    for logical, index in unstacked(path, leaves["lora_a"].shape):
        matrix = {name: leaf[index] for name, leaf in leaves.items()}
        if matrix["lora_scale"] == 0:  # not adapted
            continue
        starts = [("lora_a", "lora_b", 1), ("lora_a0", "lora_b0", -1)][: 2 if subtracted else 1]
        used = np.any([matrix[a].any(0) | matrix[b].any(1) for a, b, _ in starts], axis=0)
        used[0] |= not used.any()  # PEFT has no rank 0
        adapters[logical] = {
            name: matrix[name] for name in ("lora_scale", "magnitude") if name in matrix
        } | {
            "lora_a": np.concatenate([matrix[a][:, used] for a, _, _ in starts], axis=1),
            "lora_b": np.concatenate([sign * matrix[b][used] for _, b, sign in starts]),
        }
    return adapters


def _check(adapters: dict[str, Matrix], whole: dict[str, np.ndarray]) -> None:
    if not adapters:
        raise ValueError(
            "save_peft: the parameters hold no adapter; save_model writes whole models"
        )
    if both := sorted(path for path in whole if path.rpartition("/")[0] in adapters):
        raise ValueError(
            f"save_peft: {both[0]} is trained whole and its module is adapted; PEFT takes one of the two"
        )
    if len({"magnitude" in matrix for matrix in adapters.values()}) > 1:
        raise ValueError(
            "save_peft: some adapters have a DoRA magnitude and some have none; PEFT takes all or none"
        )
