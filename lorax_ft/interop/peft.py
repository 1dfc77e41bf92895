"""PEFT adapter folders, written and read.

PEFT stores the factors transposed (`lora_A.weight` `[r, in]`, `lora_B.weight` `[out, r]`), a tensor
for each layer of a stack, and no start: A₀ and B₀ become further columns, A' = [A, A₀] and
B' = [B; −B₀], on the original base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from lorax_ft.config import AdapterConfig
from lorax_ft.files import read_json, within
from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.huggingface import stacks_experts
from lorax_ft.interop.lazy_tensor import lazy_tensors
from lorax_ft.interop.model_card import adapter_card, write_card
from lorax_ft.interop.peft_collect import collect_adapters, differ
from lorax_ft.interop.peft_config import (
    BIN,
    CONFIG,
    WEIGHTS,
    check_fields,
    is_fused,
    without_tensors,
)
from lorax_ft.interop.peft_experts import check_fused, fit_fused, is_filled
from lorax_ft.interop.peft_folder import Contents, folder_contents, write_contents
from lorax_ft.interop.peft_layers import check_shared, stacked_leaves, with_own_weight
from lorax_ft.interop.peft_methods import Matrix, PeftMethod, method_of_config
from lorax_ft.interop.peft_methods.lora import invocation_of
from lorax_ft.interop.peft_names import Place, all_modules, find_module, known_modules
from lorax_ft.interop.peft_prompts import (
    BESIDE,
    check_prompt_config,
    holds_soft_prompt,
    load_soft_prompt,
    prompt_contents,
)
from lorax_ft.interop.peft_tensors import (
    OWN_SUFFIXES,
    PREFIX,
    Entry,
    adapter_tensors,
    shared_tensors,
)
from lorax_ft.interop.text_part import place_in
from lorax_ft.interop.tokenizer import ALL_FILES, save_tokenizer
from lorax_ft.lowrank.activation import INVOCATION, check_activated
from lorax_ft.lowrank.shared import shared_leaves
from lorax_ft.lowrank.spec import base_shape
from lorax_ft.models.model import HEAD, TABLE, LoadedModel, Model
from lorax_ft.models.soft_prompt import soft_prompt_of
from lorax_ft.schema import is_adapter, leaf_schema
from lorax_ft.tree import Layer, Tree, combine, flatten, from_modules, modules

BASE = "nf4_base"  # the folder beside a run's adapter with its base, if no other checkpoint is it


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
    A soft prompt is a folder too: this one, or `soft_prompt` in it where there is an adapter, since
    PEFT loads one at a time. The model's tokenizer and a model card, README.md, lie beside the
    adapter.

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
    if not isinstance(model, Model):
        raise ValueError(
            f"save_peft writes adapters of the decoders that load_model returns, and the model is "
            f"a {type(model).__name__}; save_adapter writes those of any Flax model"
        )
    prompt, params = soft_prompt_of(params)
    if prompt and not any(map(is_adapter, flatten(params))):
        contents = prompt_contents(prompt, model)
        _write(folder, contents, model=model, others=others, training_notes=training_notes)
        return
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
        shared=shared_leaves(params),
        base=base,
        dropout=config.dropout if config else 0.0,
        init=config.init if config else None,
        others=others,
        training_notes=training_notes,
        prompt=prompt,
    )


def write_adapter(
    folder: str | Path,
    adapters: Mapping[str, Matrix],
    whole: Mapping[str, np.ndarray],
    *,
    known: Iterable[str],
    model: Model,
    shared: Mapping[str, Any] = MappingProxyType({}),
    base: str | Path | None = None,
    dropout: float = 0.0,
    init: str | None = None,
    others: Literal["refuse", "keep"] = "refuse",
    training_notes: str = "",
    prompt: Tree | None = None,
) -> None:
    """Writes what `collect_adapters` returns.

    `known` are Hugging Face's names of all modules, `shared` the leaves that all layers share, and
    `prompt` those of a soft prompt.
    """
    contents = folder_contents(
        adapters, whole, known=known, model=model, base=base, dropout=dropout, shared=shared
    )
    _write(
        folder,
        contents,
        model=model,
        init=init,
        others=others,
        training_notes=training_notes,
        beside=prompt_contents(prompt, model) if prompt else None,
    )


def _write(
    folder: str | Path,
    contents: Contents,
    *,
    model: Model,
    init: str | None = None,
    others: Literal["refuse", "keep"],
    training_notes: str,
    beside: Contents | None = None,
) -> None:
    """Writes a folder of tensors and a config, and a soft prompt beside them."""
    _, peft_config = contents
    card = adapter_card(peft_config, init=init, training_notes=training_notes)
    replaces = ALL_FILES if model.tokenizer is not None else ()
    with new_folder(folder, replaces=(*replaces, BESIDE), others=others) as new:
        write_contents(new, contents)
        if beside is not None:
            (new / BESIDE).mkdir()
            write_contents(new / BESIDE, beside)
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
    if holds_soft_prompt(config):
        return combine(model.params, load_soft_prompt(folder, config, model))
    method = method_of_config(config, folder)
    place_there = place_in(
        key.removeprefix(PREFIX) for key in lazy_tensors(folder / WEIGHTS, dtypes=method.dtypes)
    )
    known = known_modules(model, model.params, place=place_there)
    _check_base(config, folder, model)
    layers = modules(model.params)
    raw: dict[Place, Matrix] = {}
    targets: dict[Place, Entry] = {}
    for entry in adapter_tensors(folder, config, method, model):
        place = find_module(entry.module, known, where=folder)
        if entry.leaf not in ("base", "bias"):
            targets[place] = entry
        if entry.leaf in OWN_SUFFIXES.values():
            layers |= with_own_weight(layers, place, entry, model.layout, where=folder)
        else:
            _check_adaptable(entry, layers.get(place[0], {}), where=folder)
            raw.setdefault(place, {})[entry.leaf] = entry.value
    if model.config.tied and HEAD in layers:
        table = layers[TABLE]["embedding"].T
        if not differ(layers[HEAD]["kernel"], table):
            del layers[HEAD]
    _check_complete(config, targets, known, folder)
    stacks: dict[str, dict[tuple[int, ...], Matrix]] = {}
    for place, matrix in raw.items():
        path, index = place
        sides = _sides(layers, path, model)
        complete = _completed(matrix, targets[place], sides, method, config, where=folder)
        if is_fused(path) and "lora_a" in complete and is_filled(complete):
            continue
        stacks.setdefault(path, {})[index] = complete
    for path, matrices in stacks.items():
        layers[path] = layers.get(path, {}) | stacked_leaves(
            matrices, layers, path, model.layout[path], where=folder
        )
    layers[""] = layers.get("", {}) | shared_tensors(folder, method)
    if config.get("alora_invocation_tokens"):
        layers[""][INVOCATION] = jnp.asarray(
            invocation_of(config, folder, vocab_size=model.config.vocab_size), jnp.int32
        )
    check_shared(layers, stacks, model.layout, where=folder)
    params = from_modules(layers)
    if INVOCATION in params:
        check_activated(params)
    beside = folder / BESIDE
    if not beside.is_dir():
        return params
    return combine(params, load_soft_prompt(beside, read_config(beside), model))


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
    in_run = folder / "adapter"
    if (in_run / CONFIG).is_file() and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is the output folder of a run; its adapter is in {in_run}")
    config = read_json(within(folder, CONFIG))
    within(folder, WEIGHTS)
    check_fields(config, folder)
    if holds_soft_prompt(config):
        check_prompt_config(config, folder)
    else:
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


def _completed(
    matrix: Matrix,
    entry: Entry,
    sides: tuple[int, int],
    method: PeftMethod,
    config: Mapping[str, Any],
    *,
    where: Path,
) -> Matrix:
    """All leaves of one matrix with these inputs and outputs, from its tensors."""
    inputs, outputs = sides
    place = f"{where}: {entry.module}"
    complete = method.complete(matrix, config, entry.target, place)
    method.check_fits(complete, inputs, outputs, place)
    return complete


def _sides(layers: Mapping[str, Layer], path: str, model: Model) -> tuple[int, int]:
    """The inputs and outputs of the matrices of a module."""
    spec = model.layout[path]
    _, inputs, outputs = spec.sizes(base_shape(layers, path, spec))
    return inputs, outputs


def _check_adaptable(entry: Entry, layer: Layer, *, where: Path) -> None:
    """Raise where a tensor belongs to a norm, or has the wrong number of axes."""
    if "scale" in layer:
        raise ValueError(f"{where}: {entry.key} adapts a norm, which is not supported")
    # Magnitudes are vectors; PEFT has a vector of IA3 as a matrix with one row or column.
    is_vector = len(leaf_schema(entry.leaf).axes) == 2
    if entry.value.ndim != 2 and not is_vector:
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
