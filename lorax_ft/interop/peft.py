"""PEFT adapter folders, written and read.

PEFT keeps the factors transposed (`lora_A.weight` `[r, in]`, `lora_B.weight` `[out, r]`), tensors for each layer
of a stack, and no start: A₀ and B₀ become further columns, A' = [A, A₀] and B' = [B; −B₀], on the original base.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import save_file

from lorax_ft.config import AdapterConfig
from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.huggingface import LEAVES, family_names, hf_module, unstacked
from lorax_ft.interop.peft_config import CONFIG, rank_and_scale, read_config, without_tensors, write_config
from lorax_ft.interop.peft_tensors import PREFIX, WEIGHTS, Entry, adapter_tensors
from lorax_ft.lowrank.groups import is_whole
from lorax_ft.lowrank.linear import ADAPTER_LEAVES, STEP_LEAVES, Layer, column_norm
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree, from_modules, modules

Layers = Mapping[str, Layer]
Matrix = dict[str, np.ndarray]
"""The adapter of one layer of a stack."""


def save_peft(
    folder: str | Path,
    params: Tree,
    model: Model,
    *,
    config: AdapterConfig | None = None,
    others: Literal["refuse", "keep"] = "refuse",
) -> None:
    """Writes the adapters in `params` as a folder that PEFT loads on the model's original checkpoint.

    Modules trained whole are written too. A start (PiSSA) becomes plain LoRA of twice the rank. Alpha is the
    scale times the rank.

    Args:
      folder: written beside and renamed.
      params: base and adapters together.
      model: the model as it was loaded; its source is named as the adapter's base.
      config: what the adapters were made from: says which modules were trained whole, and the dropout rate.
        None compares the weights with the model's own, and records no dropout.
      others: what becomes of files of other names in the folder.

    Raises:
      ValueError: there is no adapter, a module is both adapted and trained whole, or the folder holds other files.
    """
    adapters, whole = collect_adapters(params, model, config)
    names = family_names(model.hf_config)
    named = {path: hf_module(path, names) for path in adapters}
    tensors = {k: v for path, matrix in adapters.items() for k, v in _tensors(path, named[path], matrix).items()}
    for path, weight in whole.items():
        module, _, leaf = path.rpartition("/")
        tensors[f"{PREFIX}{hf_module(module, names)}.{LEAVES[leaf]}"] = weight
    peft_config = write_config(
        {named[path]: matrix["lora_a"].shape[1] for path, matrix in adapters.items()},
        {named[path]: matrix["lora_scale"].item() for path, matrix in adapters.items()},
        modules=_known_modules(model),
        base_model_name_or_path=model.source or None,
        lora_dropout=config.dropout if config else 0.0,
        modules_to_save=sorted({hf_module(path.rpartition("/")[0], names) for path in whole}) or None,
        use_dora=any("magnitude" in matrix for matrix in adapters.values()),
    )
    with new_folder(folder, others=others) as new:
        (new / CONFIG).write_text(json.dumps(peft_config, indent=2, sort_keys=True) + "\n")
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, new / WEIGHTS, metadata={"format": "pt"})


def load_peft(folder: str | Path, model: Model) -> Tree:
    """The model's parameters with the adapters of a PEFT folder in them.

    Args:
      folder: what `save_peft`, or PEFT's `save_pretrained`, wrote.
      model: the adapter's base.

    Raises:
      ValueError: the folder is damaged, holds no LoRA or an option that is not supported, or does not fit the model.
    """
    folder = Path(folder)
    config, known = read_config(folder), _known_modules(model)
    layers = modules(model.params)
    adapters: dict[str, dict[Any, Matrix]] = {}
    found: dict[tuple[str, Any], Entry] = {}
    for entry in adapter_tensors(folder, config, model):
        where = f"{folder}: {entry.key}"
        path, index = _place(entry.module, known, where=folder)
        if entry.leaf != "base":
            found[path, index] = entry
        if entry.leaf in ("base", "whole", "bias"):
            layers |= _with_whole(layers, path, index, entry, where=where)
        elif "scale" in layers.get(path, {}):
            raise ValueError(f"{where} is for a norm, which takes no adapter")
        elif entry.value.ndim != 2 and entry.leaf != "magnitude":
            raise ValueError(f"{where} has the shape {entry.value.shape}, which is no matrix's")
        else:
            adapters.setdefault(path, {}).setdefault(index, {})[entry.leaf] = entry.value.T
    if model.config.tied and "lm_head" in layers and not _differ(layers["lm_head"]["kernel"], _table(layers)):
        del layers["lm_head"]
    if missing := without_tensors(config, [entry.target for entry in found.values()], known):
        raise ValueError(
            f"{folder}: {CONFIG} targets {missing[0]}, but {WEIGHTS} holds nothing of it; is it another model's?"
        )
    if not found:
        raise ValueError(f"{folder}: {WEIGHTS} holds no adapter")
    for path, matrices in adapters.items():
        for index, matrix in matrices.items():
            _complete(matrix, config, found[path, index], where=folder)
        layers[path] = layers.get(path, {}) | _stacked(matrices, _base_kernel(layers, path), path=path, where=folder)
    return from_modules(layers)


def collect_adapters(
    params: Tree, model: Model, config: AdapterConfig | None
) -> tuple[dict[str, Matrix], dict[str, np.ndarray]]:
    """The adapters by logical path, and the weights trained whole by logical slash path, as `save_peft` writes them.

    Raises:
      ValueError: as `save_peft`, where PEFT has no form for what was trained.
    """
    layers, base = modules(params), modules(model.params)
    adapters: dict[str, Matrix] = {}
    whole: dict[str, np.ndarray] = {}
    for path, layer in layers.items():
        changed = _changed(path, layer, base, config)
        if "lora_a" not in layer:
            whole |= changed
        elif changed:
            raise ValueError(f"save_peft: {path} is adapted and its own weights changed too; PEFT has no form for it")
        else:
            adapters |= _exported(path, layer)
    if "embed_tokens/embedding" in whole and "lm_head" not in base and "kernel" not in layers.get("lm_head", {}):
        whole["lm_head/kernel"] = whole["embed_tokens/embedding"]  # PEFT unties a table that it trains whole
    _check(adapters, whole)
    return adapters, whole


def _known_modules(model: Model) -> dict[str, tuple[str, Any]]:
    """Where the modules of the model stand, by Hugging Face's names: the module's path and the index in its stack."""
    layers: Layers = {"lm_head": {}} | modules(model.params)
    stack = (model.config.layers, model.config.experts.count if model.config.experts else 1)
    names = family_names(model.hf_config)
    return {hf_module(logical, names): (path, index) for path in layers for logical, index in unstacked(path, stack)}


def _place(module: str, known: Mapping[str, tuple[str, Any]], *, where: Path) -> tuple[str, Any]:
    """The path of a module, and its index in the stack there."""
    if module in known:
        return known[module]
    near = difflib.get_close_matches(module, known, n=1)
    raise ValueError(f"{where}: the model has no module {module}" + (f"; the nearest is {near[0]}" if near else ""))


def _base_kernel(layers: Layers, path: str) -> Array:
    """The base weight at `path`; a tied head's is the table, transposed."""
    layer = layers.get(path, {})
    if path == "lm_head" and "kernel" not in layer:
        return _table(layers)
    return next(layer[name] for name in ("kernel", "embedding") if name in layer)


def _table(layers: Layers) -> Array:
    """The embedding table as an output head's kernel."""
    return layers["embed_tokens"]["embedding"].T


def _changed(path: str, layer: Layer, base: Layers, config: AdapterConfig | None) -> dict[str, np.ndarray]:
    """The layer's own weights where they were trained, in PEFT's orientation, by logical slash path."""
    if config is not None and not is_whole(path, config.train_whole):
        return {}
    if config is None and "lora_a0" in layer and "start_scale" not in layer:  # the init changed them
        return {}
    changed = {}
    for name in layer.keys() - ADAPTER_LEAVES - STEP_LEAVES:
        leaf = layer[name]
        old = base[path][name] if path in base else _base_kernel(base, path)
        for logical, index in unstacked(path, leaf.shape):
            if config is not None or _differ(leaf, old, index):
                value = np.asarray(leaf[index])
                changed[f"{logical}/{name}"] = value.T if name == "kernel" else value
    return changed


def _differ(leaf: Array, old: Array, index: tuple[int, ...] = ()) -> bool:
    if leaf is old:
        return False
    donated = isinstance(old, Array) and old.is_deleted()  # by a step that trained it
    return donated or not jnp.array_equal(leaf[index], old[index].astype(leaf.dtype))


def _exported(path: str, layer: Layer) -> dict[str, Matrix]:
    """The adapters of a stack, by logical path, without padding and with their start as columns of their own."""
    leaves = {name: np.asarray(layer[name]) for name in ADAPTER_LEAVES & layer.keys()}
    adapters = {}
    for logical, index in unstacked(path, leaves["lora_a"].shape):
        matrix = {name: leaf[index] for name, leaf in leaves.items()}
        if matrix["lora_scale"] == 0:  # not adapted
            continue
        starts = [("lora_a", "lora_b", 1), ("lora_a0", "lora_b0", -1)][: 2 if "lora_a0" in matrix else 1]
        used = np.any([matrix[a].any(0) | matrix[b].any(1) for a, b, _ in starts], axis=0)
        used[0] |= not used.any()  # PEFT has no rank 0
        adapters[logical] = {name: matrix[name] for name in ("lora_scale", "magnitude") if name in matrix} | {
            "lora_a": np.concatenate([matrix[a][:, used] for a, _, _ in starts], axis=1),
            "lora_b": np.concatenate([sign * matrix[b][used] for _, b, sign in starts]),
        }
    return adapters


def _check(adapters: dict[str, Matrix], whole: dict[str, np.ndarray]) -> None:
    if not adapters:
        raise ValueError("save_peft: the parameters hold no adapter; save_model writes whole models")
    if both := sorted(path for path in whole if path.rpartition("/")[0] in adapters):
        raise ValueError(f"save_peft: {both[0]} is trained whole and its module is adapted; PEFT takes one of the two")
    if len({"magnitude" in matrix for matrix in adapters.values()}) > 1:
        raise ValueError("save_peft: some adapters have a DoRA magnitude and some have none; PEFT takes all or none")


def _tensors(path: str, name: str, matrix: Matrix) -> dict[str, np.ndarray]:
    """The tensors of the adapter at a logical path, whose module has a name in the checkpoint."""
    name = PREFIX + name
    a, b = ("lora_embedding_A", "lora_embedding_B") if path == "embed_tokens" else ("lora_A.weight", "lora_B.weight")
    tensors = {f"{name}.{a}": matrix["lora_a"].T, f"{name}.{b}": matrix["lora_b"].T}
    return tensors | ({f"{name}.lora_magnitude_vector": matrix["magnitude"]} if "magnitude" in matrix else {})


def _with_whole(layers: Layers, path: str, index: Any, entry: Entry, *, where: str) -> dict[str, Layer]:
    """The layers that a weight, or a bias, of one layer of a stack replaces."""
    layer = layers.get(path) or {"kernel": _base_kernel(layers, path)}
    name = "bias" if entry.leaf == "bias" else next(n for n in ("kernel", "embedding", "scale") if n in layer)
    if name not in layer:
        raise ValueError(f"{where}: the model's module has no bias")
    old = layer[name]
    value = entry.value.T if name == "kernel" else entry.value
    if old[index].shape != value.shape:
        raise ValueError(f"{where} has the shape {value.shape}; the model's is {old[index].shape} (in, out)")
    dtype = jnp.promote_types(old.dtype, value.dtype)
    new = {path: layer | {name: jnp.asarray(old, dtype).at[index].set(jnp.asarray(value, dtype))}}
    if entry.leaf == "whole" and path == "embed_tokens" and "lm_head" not in layers:
        new["lm_head"] = {"kernel": _table(layers)}  # PEFT trains a copy: a tied head keeps the table
    return new


def _complete(matrix: Matrix, config: Mapping[str, Any], entry: Entry, *, where: Path) -> None:
    """Checks the tensors of the entry's module and puts its scale beside them."""
    needed = ["lora_a", "lora_b", *(["magnitude"] if config.get("use_dora") else [])]
    if missing := [name for name in needed if name not in matrix]:
        raise ValueError(f"{where}: {entry.module} has no {missing[0]}")
    rank, scale = rank_and_scale(config, entry.target)
    matrix["lora_scale"] = np.asarray(scale)
    if matrix["lora_a"].shape[1:] != (rank,) or matrix["lora_b"].shape[:1] != (rank,):
        given = matrix["lora_a"].shape[-1]
        raise ValueError(f"{where}: {entry.module} has rank {given} in {WEIGHTS}, and {rank} in {CONFIG}")


def _stacked(matrices: Mapping[Any, Matrix], kernel: Array, *, path: str, where: Path) -> Layer:
    """The adapter leaves of a stack: zero padding to the largest rank, scale 0 where a layer is not adapted."""
    *stack, rows, columns = kernel.shape
    rank = max(matrix["lora_a"].shape[1] for matrix in matrices.values())
    shapes = {"lora_a": (*stack, rows, rank), "lora_b": (*stack, rank, columns), "lora_scale": tuple(stack)}
    leaves = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for index, matrix in matrices.items():
        a, b = matrix["lora_a"], matrix["lora_b"]
        if (len(a), b.shape[1]) != (rows, columns):
            raise ValueError(
                f"{where}: A and B of {path} are for {len(a)} × {b.shape[1]}; the model has {rows} × {columns}"
            )
        leaves["lora_a"][index][:, : a.shape[1]] = a
        leaves["lora_b"][index][: b.shape[0]] = b
        leaves["lora_scale"][index] = matrix["lora_scale"]
    layer = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    if any("magnitude" in matrix for matrix in matrices.values()):
        magnitude = np.array(column_norm(layer | {"kernel": kernel}))  # the identity, where there is no adapter
        for index, matrix in matrices.items():
            magnitude[index] = matrix["magnitude"].reshape(-1)
        layer["magnitude"] = jnp.asarray(magnitude)
    return layer
