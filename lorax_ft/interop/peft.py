"""PEFT adapter folders, written and read.

PEFT stores the factors transposed (`lora_A.weight` `[r, in]`, `lora_B.weight` `[out, r]`), a tensor
for each layer of a stack, and no start: A₀ and B₀ become further columns, A' = [A, A₀] and
B' = [B; −B₀], on the original base.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lorax_ft.config import AdapterConfig
from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.huggingface import (
    family_names,
    hf_module,
    read_json,
    stacks_experts,
    unstacked,
)
from lorax_ft.interop.lazy_tensor import lazy_tensors
from lorax_ft.interop.model_card import adapter_card, write_card
from lorax_ft.interop.peft_collect import collect_adapters, differ
from lorax_ft.interop.peft_config import BIN, CONFIG, WEIGHTS, is_fused, without_tensors
from lorax_ft.interop.peft_experts import check_fused, fit_fused, is_filled
from lorax_ft.interop.peft_folder import folder_contents
from lorax_ft.interop.peft_methods import Matrix, method_of_config
from lorax_ft.interop.peft_stacks import every_stack
from lorax_ft.interop.peft_tensors import OWN_SUFFIXES, PREFIX, Entry, adapter_tensors
from lorax_ft.interop.text_part import peft_place, place_in
from lorax_ft.interop.tokenizer import ALL_FILES, save_tokenizer
from lorax_ft.lowrank.layout import Layout
from lorax_ft.lowrank.spec import LayerSpec, base_kernel, base_shape, with_kernel
from lorax_ft.lowrank.terms import magnitude
from lorax_ft.models.model import HEAD, TABLE, LoadedModel, Model
from lorax_ft.quant.kernels import Quantized
from lorax_ft.schema import leaf_schema
from lorax_ft.tree import Layer, Tree, from_modules, modules

BASE = "nf4_base"  # the folder beside a run's adapter with its base, if no other checkpoint is it
Place = tuple[str, tuple[int, ...]]
"""The path of a module, and the index of one matrix in its stack."""


def save_peft(
    folder: str | Path,
    params: Tree,
    model: Model,
    *,
    config: AdapterConfig | None = None,
    base: str | Path | None = None,
    others: Literal["refuse", "keep"] = "refuse",
    training_notes: str = "",
) -> None:
    """Writes the adapters in `params` as a folder that PEFT loads on the original checkpoint.

    Fully trained modules are written too, and biases beside a LoRA adapter. A start (PiSSA) becomes
    plain LoRA of twice the rank on the original, and nothing on `base`. Alpha is the scale times
    the rank. Experts and routers all get one rank and one alpha, since PEFT fuses them.
    The model's tokenizer and a model card, README.md, lie beside the adapter.

    Args:
      folder: on a disk, a bucket (gs://, s3://) or the hub (hf://owner/name); written to a
        temporary folder first, then renamed or uploaded.
      params: base and adapters together.
      model: the model as it was loaded; its source is named as the adapter's base.
      config: what the adapters were made from: says which modules were trained in full, and the
        dropout rate. None compares the weights with the model's own, and records no dropout.
      base: folder with the base as it is in `params`, without the starts (`save_quantized`), on
        which PEFT is to load the adapter. Needed where an init changed a quantized base, since no
        adapter on the original is equal to that.
      others: whether files of other names in the folder are kept, or refused.
      training_notes: Markdown about the training, for the model card. A card that a person wrote
        is kept as it is.

    Raises:
      ValueError: there is no adapter, a module is both adapted and trained in full, `base` is
        needed, or the folder holds other files.
    """
    adapters, whole = collect_adapters(params, model, config, base=base)
    fully_trained: dict[str, Matrix] = {}
    for path, weight in whole.items():
        parent, _, leaf = path.rpartition("/")
        fully_trained.setdefault(parent, {})[leaf] = weight
    check_fused({**fully_trained, **adapters})
    write_adapter(
        folder,
        adapters if stacks_experts(model.hf_config) else fit_fused(adapters, model),
        whole,
        known=all_modules(model, params),
        model=model,
        base=base,
        dropout=config.dropout if config else 0.0,
        init=config.init if config else None,
        others=others,
        training_notes=training_notes,
    )


def write_adapter(
    folder: str | Path,
    adapters: Mapping[str, Matrix],
    whole: Mapping[str, np.ndarray],
    *,
    known: Iterable[str],
    model: Model,
    base: str | Path | None = None,
    dropout: float = 0.0,
    init: str | None = None,
    others: Literal["refuse", "keep"] = "refuse",
    training_notes: str = "",
) -> None:
    """Writes what `collect_adapters` returns; `known` are Hugging Face's names of all modules."""
    tensors, peft_config = folder_contents(
        adapters, whole, known=known, model=model, base=base, dropout=dropout
    )
    card = adapter_card(peft_config, init=init, training_notes=training_notes)
    replaces = ALL_FILES if model.tokenizer is not None else ()
    with new_folder(folder, replaces=replaces, others=others) as new:
        (new / CONFIG).write_text(json.dumps(peft_config, indent=2, sort_keys=True) + "\n")
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        write_card(new, card, target=folder)
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, new)


def load_peft(folder: str | Path, model: LoadedModel) -> Tree:
    """The model's parameters with the adapters of a PEFT folder in them.

    Args:
      folder: what `save_peft`, or PEFT's `save_pretrained`, wrote.
      model: the adapter's base.

    Raises:
      ValueError: the folder is damaged, its type or an option of it is not supported, or it does
        not fit the model.
    """
    folder = Path(folder)
    config = read_config(folder)
    method = method_of_config(config, folder)
    place_there = place_in(key.removeprefix(PREFIX) for key in lazy_tensors(folder / WEIGHTS))
    known = known_modules(model, model.params, place=place_there)
    _check_base(config, folder, model)
    layers = modules(model.params)
    raw: dict[Place, Matrix] = {}
    targets: dict[Place, Entry] = {}
    for entry in adapter_tensors(folder, config, method, model):
        place = _place(entry.module, known, where=folder)
        if entry.leaf not in ("base", "bias"):
            targets[place] = entry
        if entry.leaf in OWN_SUFFIXES.values():
            layers |= _with_own_weight(layers, place, entry, model.layout, where=folder)
        else:
            _check_adaptable(entry, layers.get(place[0], {}), where=folder)
            raw.setdefault(place, {})[entry.leaf] = entry.value
    if model.config.tied and HEAD in layers:
        table = layers[TABLE]["embedding"].T
        if not differ(layers[HEAD]["kernel"], table):
            del layers[HEAD]
    _check_complete(config, targets, known, folder)
    stacks: dict[str, dict[tuple[int, ...], Matrix]] = {}
    for (path, index), matrix in raw.items():
        entry = targets[path, index]
        where = f"{folder}: {entry.module}"
        complete = method.complete(matrix, config, entry.target, where)
        if is_fused(path) and "lora_a" in complete and is_filled(complete):
            continue
        stacks.setdefault(path, {})[index] = complete
    for path, matrices in stacks.items():
        layers[path] = layers.get(path, {}) | _stacked(
            matrices, layers, path, model.layout[path], where=folder
        )
    return from_modules(layers)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
      ValueError: it is missing, the weights are only there as a pickle, its type is not supported,
        or it has an option that changes numbers and is not supported.
    """
    if (folder / BIN).is_file() and not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} holds an adapter as {BIN}, a pickle that could run code and is not read; "
            f"load it in PEFT and save it again, which writes {WEIGHTS}"
        )
    config = read_json(folder / CONFIG)
    method_of_config(config, folder).check_config(config, folder)
    return config


def _check_base(config: Mapping[str, Any], folder: Path, model: Model) -> None:
    """Raise where the adapter is for a base without its start and the model is not that base.

    Likewise where the model is such a base, and the adapter is for another.
    """
    # PEFT allows null here.
    named = Path(config.get("base_model_name_or_path") or "")
    source = Path(model.source).resolve()
    beside_folder = folder.resolve().parent / BASE
    is_own_base = source in (named.resolve(), beside_folder)
    if model.without_start and not is_own_base:
        raise ValueError(
            f"{model.source} is the base of another adapter, without its start; {folder} was "
            f"trained on {named}: load that"
        )
    if named.name == BASE and not (is_own_base and model.without_start):
        raise ValueError(f"{folder} was trained on {named}, not on {model.source}; load {named}")


def _check_adaptable(entry: Entry, layer: Layer, *, where: Path) -> None:
    """Raise where a tensor belongs to a norm, or has the wrong number of axes."""
    if "scale" in layer:
        raise ValueError(f"{where}: {entry.key} adapts a norm, which is not supported")
    # Magnitudes are vectors; PEFT has a vector of IA3 as a matrix with one row or column.
    vectors = leaf_schema(entry.leaf).axes == ("stack", "out")
    if entry.value.ndim != 2 and not vectors:
        raise ValueError(
            f"{where}: {entry.key} has the shape {entry.value.shape}; it must be a matrix"
        )


def _check_complete(
    config: Mapping[str, Any],
    targets: Mapping[Place, Entry],
    known: Mapping[str, Place],
    folder: Path,
) -> None:
    """Raise where the folder lacks tensors of its targets, or has no tensors at all."""
    with_tensors = [entry.target for entry in targets.values()]
    missing = without_tensors(config, with_tensors, known)
    if missing:
        raise ValueError(
            f"{folder}: {CONFIG} targets {missing[0]}, but {WEIGHTS} holds no tensor for it; is it "
            "another model's?"
        )
    if not targets:
        raise ValueError(f"{folder}: {WEIGHTS} holds no adapter")


def all_modules(model: Model, params: Tree) -> list[str]:
    """Hugging Face's names of the modules among which those of an adapter are told apart."""
    place = peft_place(model.hf_config)
    names = list(known_modules(model, params, place=place))
    if stacks_experts(model.hf_config):
        names += every_stack(names)
    if place == "model":
        return names
    # A vision tower may have modules of the same last names, so those alone name none.
    elsewhere = [f"vision_tower.{name.rpartition('.')[2]}" for name in names]
    return names + elsewhere


def known_modules(model: Model, params: Tree, *, place: str = "model") -> dict[str, Place]:
    """Where the modules of the model stand, by Hugging Face's names."""
    experts = 1
    if model.config.experts:
        experts = model.config.experts.count
    layers = model.config.layers // model.config.period
    stack = (layers, experts)
    names = family_names(model.hf_config)
    known = {}
    # A tied head is not in the tree, but a folder may untie it.
    for path in {HEAD: {}} | modules(params):
        for logical, index in unstacked(path, stack):
            known[hf_module(logical, names, place=place)] = (path, index)
    return known


def _place(module: str, known: Mapping[str, Place], *, where: Path) -> Place:
    """The path of a module, and its index in the stack there."""
    if module in known:
        return known[module]
    near = difflib.get_close_matches(module, known, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ValueError(f"{where}: the model has no module {module}{hint}")


def _with_own_weight(
    layers: Mapping[str, Layer],
    place: Place,
    entry: Entry,
    layout: Layout,
    *,
    where: Path,
) -> dict[str, Layer]:
    """The layers that a weight, or a bias, of one layer of a stack replaces."""
    path, index = place
    layer = layers.get(path)
    if layer is None:  # a tied head, which the folder unties
        layer = {"kernel": base_kernel(layers, path, layout[path])}
    if entry.leaf == "bias":
        name = "bias"
    else:
        name = next(name for name in ("kernel", "embedding", "scale") if name in layer)
    if name not in layer:
        raise ValueError(f"{where}: {entry.key}: the model's module has no bias")
    old = layer[name]
    if isinstance(old, Quantized):
        raise ValueError(
            f"{where}: {entry.key} was trained in full, but the model is quantized: load it with "
            "quant.format none"
        )
    value = entry.value
    expected = old[index].shape
    if name == "kernel":
        expected = expected[::-1]  # torch's Linear has [out, in]
    if expected != value.shape:
        raise ValueError(
            f"{where}: {entry.key} has the shape {value.shape}; the model's is {expected}"
        )
    if name == "kernel":
        value = value.T
    dtype = jnp.promote_types(old.dtype, value.dtype)
    replaced = jnp.asarray(old, dtype).at[index].set(jnp.asarray(value, dtype))
    new = {path: layer | {name: replaced}}
    if entry.leaf == "whole" and path == TABLE and HEAD not in layers:
        # PEFT trains a copy of the table, so a tied head keeps the original.
        new[HEAD] = {"kernel": base_kernel(layers, HEAD, layout[HEAD])}
    return new


def _stacked(
    matrices: Mapping[tuple[int, ...], Matrix],
    layers: Mapping[str, Layer],
    path: str,
    spec: LayerSpec,
    *,
    where: Path,
) -> Layer:
    """The adapter leaves of a stack: zeros beyond a matrix's rank, and for matrices without one."""
    kernel_shape = base_shape(layers, path, spec)
    rank = max(map(_rank, matrices.values()))
    names = {frozenset(matrix) for matrix in matrices.values()}
    if len(names) > 1:
        raise ValueError(
            f"{where}: the layers of {path} are adapted in different ways; here they are one "
            "stack, whose layers must be adapted alike"
        )
    leaves = {}
    for name in next(iter(matrices.values())):
        shape = spec.leaf_shape(name, kernel_shape, rank=rank)
        leaves[name] = np.zeros(shape, np.float32)
    for index, matrix in matrices.items():
        for name, value in matrix.items():
            leaf = leaves[name]
            _check_fits(name, value, leaf[index].shape, path, where=where)
            # Only a rank axis may be longer than the matrix's own.
            own: tuple[Any, ...] = tuple(slice(size) for size in value.shape)
            leaf[index + own] = value
    layer = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    stack, _, _ = spec.sizes(kernel_shape)
    if magnitude.MAGNITUDE in layer and len(matrices) < math.prod(stack):
        # Where there is no adapter, the magnitude is the identity.
        adapted = layers.get(path, {}) | layer
        whole = with_kernel({**layers, path: adapted}, path, spec)
        full = np.array(magnitude.column_norm(whole))
        for index, matrix in matrices.items():
            full[index] = matrix[magnitude.MAGNITUDE]
        layer[magnitude.MAGNITUDE] = jnp.asarray(full)
    return layer


def _rank(matrix: Matrix) -> int:
    """The rank of a matrix's adapter; 0 where it has none."""
    for name, value in matrix.items():
        _, *axes = leaf_schema(name).axes  # without the stack axis
        if "rank" in axes:
            return value.shape[axes.index("rank")]
    return 0


def _check_fits(
    name: str,
    value: np.ndarray,
    expected: tuple[int, ...],
    path: str,
    *,
    where: Path,
) -> None:
    """Raise where a leaf has another size than the model's module, apart from its rank."""
    axes = leaf_schema(name).axes[1:]
    rank_as_given = [
        size if axis == "rank" else wanted
        for axis, size, wanted in zip(axes, value.shape, expected, strict=True)
    ]
    needed = tuple(rank_as_given)
    if value.shape == needed:
        return
    given = value.shape
    if name in ("lora_a", "lora_b"):  # in the file they stand the other way round
        given, needed = given[::-1], needed[::-1]
    raise ValueError(f"{where}: {name} of {path} has the shape {given}; the model needs {needed}")
