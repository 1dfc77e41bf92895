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
from lorax_ft.interop.peft_collect import (
    Layers,
    Matrix,
    base_kernel,
    collect_adapters,
    differ,
    table,
)
from lorax_ft.interop.peft_config import (
    CONFIG,
    rank_and_scale,
    read_config,
    without_tensors,
    write_config,
)
from lorax_ft.interop.peft_tensors import PREFIX, WEIGHTS, Entry, adapter_tensors
from lorax_ft.lowrank.linear import Layer, column_norm
from lorax_ft.models.model import Model
from lorax_ft.quant.kernels import Quantized
from lorax_ft.tree import Tree, from_modules, modules

BASE = "nf4_base"  # the folder beside a run's adapter that holds its base, where a checkpoint elsewhere is not it


def save_peft(
    folder: str | Path,
    params: Tree,
    model: Model,
    *,
    config: AdapterConfig | None = None,
    base: str | Path | None = None,
    others: Literal["refuse", "keep"] = "refuse",
) -> None:
    """Writes the adapters in `params` as a folder that PEFT loads on the model's original checkpoint, or on `base`.

    Modules trained whole are written too. A start (PiSSA) becomes plain LoRA of twice the rank on the original, and
    nothing on `base`. Alpha is the scale times the rank.

    Args:
      folder: written beside and renamed.
      params: base and adapters together.
      model: the model as it was loaded; its source is named as the adapter's base.
      config: what the adapters were made from: says which modules were trained whole, and the dropout rate.
        None compares the weights with the model's own, and records no dropout.
      base: folder with the base as it stands in `params`, without the starts (`save_quantized`); needed where an init
        changed a base that is quantized, since no adapter on the original gives that back.
      others: what becomes of files of other names in the folder.

    Raises:
      ValueError: there is no adapter, a module is both adapted and trained whole, `base` is needed, or the folder holds
        other files.
    """
    adapters, whole = collect_adapters(params, model, config, base=base)
    names = family_names(model.hf_config)
    named = {path: hf_module(path, names) for path in adapters}
    tensors = {
        k: v
        for path, matrix in adapters.items()
        for k, v in _tensors(path, named[path], matrix).items()
    }
    for path, weight in whole.items():
        module, _, leaf = path.rpartition("/")
        tensors[f"{PREFIX}{hf_module(module, names)}.{LEAVES[leaf]}"] = weight
    peft_config = write_config(
        {named[path]: matrix["lora_a"].shape[1] for path, matrix in adapters.items()},
        {named[path]: matrix["lora_scale"].item() for path, matrix in adapters.items()},
        modules=_known_modules(model),
        base_model_name_or_path=str(base) if base else model.source or None,
        lora_dropout=config.dropout if config else 0.0,
        modules_to_save=sorted({hf_module(path.rpartition("/")[0], names) for path in whole})
        or None,
        use_dora=any("magnitude" in matrix for matrix in adapters.values()),
    )
    with new_folder(folder, others=others) as new:
        (new / CONFIG).write_text(json.dumps(peft_config, indent=2, sort_keys=True) + "\n")
        save_file(
            {k: np.ascontiguousarray(v) for k, v in tensors.items()},
            new / WEIGHTS,
            metadata={"format": "pt"},
        )


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
    _check_base(config, folder, model)
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
            raise ValueError(f"{where} has the shape {entry.value.shape}, which is not a matrix's")
        else:
            adapters.setdefault(path, {}).setdefault(index, {})[entry.leaf] = entry.value.T
    if (
        model.config.tied
        and "lm_head" in layers
        and not differ(layers["lm_head"]["kernel"], table(layers))
    ):
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
        layers[path] = layers.get(path, {}) | _stacked(
            matrices, base_kernel(layers, path), path=path, where=folder
        )
    return from_modules(layers)


def _check_base(config: Mapping[str, Any], folder: Path, model: Model) -> None:
    """Raise where the adapter is for a base without its start and the model is none, or another's."""
    named, source = Path(config.get("base_model_name_or_path") or ""), Path(model.source).resolve()
    own = source in (named.resolve(), folder.resolve().parent / BASE)
    if model.without_start and not own:
        raise ValueError(
            f"{model.source} lacks another adapter's start; {folder} was trained on {named}: load that"
        )
    if named.name == BASE and not (own and model.without_start):
        raise ValueError(
            f"{folder} was trained on {named}, not on {model.source}; load that with it"
        )


def _known_modules(model: Model) -> dict[str, tuple[str, Any]]:
    """Where the modules of the model stand, by Hugging Face's names: the module's path and the index in its stack."""
    layers: Layers = {"lm_head": {}} | modules(model.params)
    stack = (model.config.layers, model.config.experts.count if model.config.experts else 1)
    names = family_names(model.hf_config)
    return {
        hf_module(logical, names): (path, index)
        for path in layers
        for logical, index in unstacked(path, stack)
    }


def _place(module: str, known: Mapping[str, tuple[str, Any]], *, where: Path) -> tuple[str, Any]:
    """The path of a module, and its index in the stack there."""
    if module in known:
        return known[module]
    near = difflib.get_close_matches(module, known, n=1)
    raise ValueError(
        f"{where}: the model has no module {module}"
        + (f"; the nearest is {near[0]}" if near else "")
    )


def _tensors(path: str, name: str, matrix: Matrix) -> dict[str, np.ndarray]:
    """The tensors of the adapter at a logical path, whose module has a name in the checkpoint."""
    name = PREFIX + name
    a, b = (
        ("lora_embedding_A", "lora_embedding_B")
        if path == "embed_tokens"
        else ("lora_A.weight", "lora_B.weight")
    )
    tensors = {f"{name}.{a}": matrix["lora_a"].T, f"{name}.{b}": matrix["lora_b"].T}
    return tensors | (
        {f"{name}.lora_magnitude_vector": matrix["magnitude"]} if "magnitude" in matrix else {}
    )


def _with_whole(
    layers: Layers, path: str, index: Any, entry: Entry, *, where: str
) -> dict[str, Layer]:
    """The layers that a weight, or a bias, of one layer of a stack replaces."""
    layer = layers.get(path) or {"kernel": base_kernel(layers, path)}
    name = (
        "bias"
        if entry.leaf == "bias"
        else next(n for n in ("kernel", "embedding", "scale") if n in layer)
    )
    if name not in layer:
        raise ValueError(f"{where}: the model's module has no bias")
    old = layer[name]
    if isinstance(old, Quantized):
        raise ValueError(
            f"{where} was trained whole; the model's is quantized: load it with quant.format none"
        )
    value = entry.value.T if name == "kernel" else entry.value
    if old[index].shape != value.shape:
        raise ValueError(
            f"{where} has the shape {value.shape}; the model's is {old[index].shape} (in, out)"
        )
    dtype = jnp.promote_types(old.dtype, value.dtype)
    new = {path: layer | {name: jnp.asarray(old, dtype).at[index].set(jnp.asarray(value, dtype))}}
    if entry.leaf == "whole" and path == "embed_tokens" and "lm_head" not in layers:
        new["lm_head"] = {
            "kernel": table(layers)
        }  # PEFT trains a copy: a tied head keeps the table
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
        raise ValueError(
            f"{where}: {entry.module} has rank {given} in {WEIGHTS}, and {rank} in {CONFIG}"
        )


def _stacked(
    matrices: Mapping[Any, Matrix], kernel: Array | Quantized, *, path: str, where: Path
) -> Layer:
    """The adapter leaves of a stack: zero padding to the largest rank, scale 0 where a layer is not adapted."""
    *stack, rows, columns = kernel.shape
    rank = max(matrix["lora_a"].shape[1] for matrix in matrices.values())
    shapes = {
        "lora_a": (*stack, rows, rank),
        "lora_b": (*stack, rank, columns),
        "lora_scale": tuple(stack),
    }
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
        magnitude = np.array(
            column_norm(layer | {"kernel": kernel})
        )  # the identity, where there is no adapter
        for index, matrix in matrices.items():
            magnitude[index] = matrix["magnitude"].reshape(-1)
        layer["magnitude"] = jnp.asarray(magnitude)
    return layer
