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
from lorax_ft.files import existing_folder
from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.huggingface import stacks_experts
from lorax_ft.interop.lazy_tensor import lazy_tensors
from lorax_ft.interop.model_card import adapter_card, write_card
from lorax_ft.interop.peft_checks import (
    check_adaptable,
    check_base,
    check_complete,
    check_decoder,
    check_modules,
    read_config,
)
from lorax_ft.interop.peft_collect import collect_adapters, differ
from lorax_ft.interop.peft_config import CONFIG, WEIGHTS, is_fused
from lorax_ft.interop.peft_experts import check_fused, fit_fused, is_filled
from lorax_ft.interop.peft_folder import Contents, folder_contents, write_contents
from lorax_ft.interop.peft_layers import check_shared, stacked_leaves, with_own_weight
from lorax_ft.interop.peft_methods import Matrix, PeftMethod, method_of_config
from lorax_ft.interop.peft_methods.bottleneck import BOTTLENECK
from lorax_ft.interop.peft_methods.lora import invocation_of
from lorax_ft.interop.peft_names import Place, all_modules, find_module, known_modules
from lorax_ft.interop.peft_prompts import (
    BESIDE,
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
from lorax_ft.interop.peft_tokens import (
    beside_adapter,
    tokens_alone,
    trains_tokens_alone,
    with_tokens,
)
from lorax_ft.interop.text_part import place_in
from lorax_ft.interop.tokenizer import ALL_FILES, save_tokenizer
from lorax_ft.lowrank.activation import INVOCATION, check_activated
from lorax_ft.lowrank.shared import shared_leaves
from lorax_ft.lowrank.spec import base_shape
from lorax_ft.models.model import HEAD, TABLE, LoadedModel, Model
from lorax_ft.models.soft_prompt import soft_prompt_of
from lorax_ft.models.trainable_tokens import trainable_tokens_of
from lorax_ft.schema import is_adapter
from lorax_ft.tree import Layer, Tree, combine, flatten, from_modules, modules


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
    Trainable tokens stand beside a LoRA adapter, or alone in a folder of PEFT's type for them.
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
      ValueError: the model or the parameters are not those of `load_model`, there is no adapter, a
        module is both adapted and trained in full, `base` is needed, or the folder holds other
        files.
    """
    check_decoder(model, "save_peft")
    prompt, params = soft_prompt_of(params)
    tokens, params = trainable_tokens_of(params)
    check_modules(params, model)
    alone = None
    if not any(map(is_adapter, flatten(params))):
        if tokens and prompt:
            raise ValueError(
                "a soft prompt and trainable tokens without an adapter are two folders "
                "in PEFT; save them one by one"
            )
        if prompt:
            alone = prompt_contents(prompt, model)
        elif tokens:
            alone = tokens_alone(tokens, model)
    if alone is not None:
        _write(folder, alone, model=model, others=others, training_notes=training_notes)
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
        tokens=tokens,
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
    tokens: Tree | None = None,
) -> None:
    """Writes what `collect_adapters` returns.

    `known` are Hugging Face's names of all modules, `shared` the leaves that all layers share,
    `prompt` those of a soft prompt and `tokens` those of trainable tokens.
    """
    contents = folder_contents(
        adapters, whole, known=known, model=model, base=base, dropout=dropout, shared=shared
    )
    if tokens:
        contents = beside_adapter(contents, tokens, model)
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
    tensors, peft_config = contents
    card = adapter_card(
        peft_config,
        init=init,
        training_notes=training_notes,
        table_rows=_table_rows(tensors),
        beside_prompt=beside is not None,
    )
    replaces = ALL_FILES if model.tokenizer is not None else ()
    with new_folder(folder, replaces=(*replaces, BESIDE), others=others) as new:
        write_contents(new, contents)
        if beside is not None:
            (new / BESIDE).mkdir()
            write_contents(new / BESIDE, beside)
        write_card(new, card, target=folder)
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, new)


def _table_rows(tensors: Mapping[str, np.ndarray]) -> int | None:
    """How many rows the embedding has, if the folder holds all of it."""
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight"):
            return len(tensor)
    return None


def load_peft(folder: str | Path, model: LoadedModel) -> Tree:
    """The model's parameters with the adapters of a PEFT folder in them.

    Args:
      folder: what `save_peft`, or PEFT's `save_pretrained`, wrote.
      model: the adapter's base.

    Raises:
      ValueError: the folder is damaged, its type or an option of it is not supported, or it does
        not fit the model.
    """
    check_decoder(model, "load_peft")
    folder = existing_folder(folder, holding=CONFIG)
    config = read_config(folder)
    if holds_soft_prompt(config):
        return combine(model.params, load_soft_prompt(folder, config, model))
    if trains_tokens_alone(config):
        return from_modules(with_tokens(modules(model.params), folder, config, model))
    layers = _with_adapters(modules(model.params), folder, config, model)
    layers = with_tokens(layers, folder, config, model)
    params = from_modules(layers)
    if INVOCATION in params:
        check_activated(params)
    beside = folder / BESIDE
    if not beside.is_dir():
        return params
    return combine(params, load_soft_prompt(beside, read_config(beside), model))


def _with_adapters(
    layers: dict[str, Layer],
    folder: Path,
    config: Mapping[str, Any],
    model: LoadedModel,
) -> dict[str, Layer]:
    """The layers with the adapters of a folder, and with the weights that it trained in full."""
    method = method_of_config(config, folder)
    known = _known_modules(folder, method, model)
    check_base(config, folder, model)
    tensors: dict[Place, Matrix] = {}
    targets: dict[Place, Entry] = {}
    for entry in adapter_tensors(folder, config, method, model):
        place = find_module(entry.module, known, where=folder)
        if entry.leaf not in ("base", "bias"):
            targets[place] = entry
        if entry.leaf in OWN_SUFFIXES.values():
            layers |= with_own_weight(layers, place, entry, model.layout, where=folder)
        else:
            check_adaptable(entry, layers.get(place[0], {}), where=folder)
            tensors.setdefault(place, {})[entry.leaf] = entry.value
    if model.config.tied and _is_table(layers.get(HEAD), layers[TABLE]):
        del layers[HEAD]
    check_complete(config, targets, known, folder)

    stacks: dict[str, dict[tuple[int, ...], Matrix]] = {}
    for place, matrix in tensors.items():
        path, index = place
        sides = _sides(layers, path, model)
        complete = _completed(matrix, targets[place], sides, method, config, where=folder)
        if is_fused(path) and "lora_a" in complete and is_filled(complete):
            continue
        stacks.setdefault(path, {})[index] = complete
    for path, matrices in stacks.items():
        spec = model.layout[path]
        leaves = stacked_leaves(matrices, layers, path, spec, where=folder)
        layers[path] = layers.get(path, {}) | leaves

    shared = shared_tensors(folder, method)
    if config.get("alora_invocation_tokens"):
        invocation = invocation_of(config, folder, vocab_size=model.config.vocab_size)
        shared[INVOCATION] = jnp.asarray(invocation, jnp.int32)
    layers[""] = layers.get("", {}) | shared
    check_shared(layers, stacks, model.layout, where=folder)
    return layers


def _known_modules(folder: Path, method: PeftMethod, model: LoadedModel) -> dict[str, Place]:
    """Where the modules lie that a folder may name."""
    names = lazy_tensors(folder / WEIGHTS, dtypes=method.dtypes)
    place_there = place_in(name.removeprefix(PREFIX) for name in names)
    blocks = model.layout.blocks if method is BOTTLENECK else ()
    return known_modules(model, model.params, place=place_there, blocks=blocks)


def _is_table(head: Layer | None, embedding: Layer) -> bool:
    """Whether a folder's own head is the table that it is tied to."""
    return head is not None and not differ(head["kernel"], embedding["embedding"].T)


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
