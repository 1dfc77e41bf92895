"""Saves our trees as Hugging Face checkpoints: safetensors, configs and tokenizer."""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np
from safetensors.numpy import save_file

from lorax_ft.interop.bitsandbytes import nf4_tensors, quantization_config
from lorax_ft.interop.bucket import is_hub, repo_id
from lorax_ft.interop.end_tokens import ids_that_stop
from lorax_ft.interop.expert_stacks import joined_experts
from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.huggingface import (
    INDEX,
    WEIGHTS,
    family_names,
    hf_names,
    hf_tensors,
    stacks_experts,
)
from lorax_ft.interop.model_card import model_card, write_card
from lorax_ft.interop.tokenizer import ALL_FILES, save_tokenizer
from lorax_ft.lowrank.merge import merged_leaves
from lorax_ft.lowrank.requantize import is_requantized
from lorax_ft.models.model import HEAD, PART_OF, WITHOUT_START, Model, abstract_params
from lorax_ft.quant.double import DoubleQuantized
from lorax_ft.quant.int8 import Int8
from lorax_ft.quant.nf4 import NF4
from lorax_ft.schema import is_base
from lorax_ft.tree import Tree, flatten, modules

# transformers' default up to version 4.
SHARD_BYTES = 5 * 10**9
Tensor = tuple[str, np.ndarray]
Files = dict[str, dict[str, int]]
"""File name -> tensor name -> size in bytes."""


def save_model(
    folder: str | Path,
    params: Tree,
    model: Model,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    others: Literal["refuse", "keep"] = "refuse",
    training_notes: str = "",
) -> None:
    """Writes `params` as a checkpoint for transformers: config, tokenizer and model card, too.

    Adapters in `params` are merged one leaf at a time. If the output head then differs from the
    embedding table, it is written too, and the config unties the two.

    Args:
      folder: where to write, on a disk, a bucket (gs://, s3://) or the hub (hf://owner/name); the
        files appear there once all of them are complete.
      params: parameters, with or without adapters.
      model: provides the config and the tokenizer.
      dtype: of the tensors written; None keeps the dtype of each.
      shard_bytes: the largest size of a file; a larger checkpoint is split and gets an index.
      others: what to do if the folder holds files other than a model's: refuse to write, or keep
        them.
      training_notes: Markdown about the training, for the model card. A card that a person wrote
        is kept as it is.

    Raises:
      ValueError: `params` are not the model's, the model has no `hf_config`, or the folder holds
        other files or is where the model was loaded from.
      OSError: the disk is full or not writable.
    """
    _check_model(model, "save_model")
    card = model_card(model, training_notes=training_notes)
    tensors = _tensors(params, model, dtype)
    _write(folder, tensors, model, shard_bytes=shard_bytes, others=others, card=card)


def save_quantized(
    folder: str | Path,
    params: Tree,
    model: Model,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the base in `params`, with its NF4 kernels, as a checkpoint for bitsandbytes.

    Adapters are left out. The base is written bit for bit as they use it: if their init took its
    start out of the base (PiSSA, LoftQ, OLoRA), the start is not put back, which is what
    `save_peft(base=folder)` expects. transformers 5 cannot load experts in 4 bits, so only this
    library loads a base with experts.

    Args:
      folder: as in `save_model`.
      params: parameters, with or without adapters.
      model: provides the config and the tokenizer.
      shard_bytes: as in `save_model`.

    Raises:
      ValueError: no kernel is in NF4, or one is in int8; and as `save_model`.
      OSError: the disk is full or not writable.
    """
    _check_model(model, "save_quantized")
    leaves = {path: leaf for path, leaf in flatten(params).items() if is_base(path)}
    nf4_kernels = [leaf for leaf in leaves.values() if isinstance(leaf, NF4)]
    if not nf4_kernels or any(isinstance(leaf, Int8) for leaf in leaves.values()):
        raise ValueError(
            "save_quantized writes bases with kernels in NF4 (quant.format nf4); "
            "use save_model for others"
        )
    # `load_model` and `quantize_base` use double quantization for all kernels or for none.
    double_quant = isinstance(nf4_kernels[0].absmax, DoubleQuantized)
    dtype = model.config.dtype
    quantization = quantization_config(
        double_quant=double_quant, dtype=dtype, skipped=_skipped_modules(leaves, model)
    )
    fields: dict[str, Any] = {"quantization_config": quantization, "dtype": dtype}
    if model.without_start or any(map(is_requantized, modules(params).values())):
        fields[WITHOUT_START] = True
    _write(folder, _quantized_tensors(leaves, model), model, shard_bytes=shard_bytes, fields=fields)


def _check_model(model: Any, function: str) -> None:
    """Raise where the model is not one of this library's, whose tensors have known names."""
    if not isinstance(model, Model):
        raise ValueError(
            f"{function} writes the decoders that load_model returns, and the model is a "
            f"{type(model).__name__}; save the tree of merge_adapters as that model's library does"
        )


def _skipped_modules(leaves: Mapping[str, Any], model: Model) -> list[str]:
    """Hugging Face's names of the linear modules that are not quantized."""
    family = family_names(model.hf_config)
    # A tied head has no leaf, but transformers quantizes every module that is not listed.
    skipped = {HEAD}
    for path, leaf in leaves.items():
        is_kernel = path.endswith("/kernel")
        if not is_kernel or isinstance(leaf, NF4):
            continue
        for name, _ in hf_names(path, leaf.shape, family):
            skipped.add(name.removesuffix(".weight"))
    return sorted(skipped)


def _tensors(params: Tree, model: Model, dtype: str | None) -> Iterator[Tensor]:
    """Yields the checkpoint's tensors one at a time."""
    names = family_names(model.hf_config)
    found = set()

    def leaves() -> Iterator[Tensor]:
        for path, leaf in merged_leaves(params, layout=model.layout):
            found.add(path)
            yield path, np.asarray(leaf)

    single = itertools.chain.from_iterable(hf_tensors(*leaf, names) for leaf in leaves())
    joined = joined_experts(leaves(), names)
    for name, tensor in joined if stacks_experts(model.hf_config) else single:
        yield name, np.ascontiguousarray(tensor, dtype)
    # At the end, because merging decides whether there is a head; the folder is not renamed yet.
    _check_leaves(found, model)


def _quantized_tensors(leaves: Mapping[str, Any], model: Model) -> Iterator[Tensor]:
    """Yields the tensors of an NF4 checkpoint one at a time."""
    _check_leaves(set(leaves), model)
    names = family_names(model.hf_config)
    for path, leaf in leaves.items():
        host = jax.tree.map(np.asarray, leaf)
        if isinstance(leaf, NF4):
            for name, index in hf_names(path, leaf.shape, names):
                take = operator.itemgetter(index)
                kernel = jax.tree.map(take, host)
                yield from nf4_tensors(name, kernel)
            continue
        for name, tensor in hf_tensors(path, host, names):
            # Fully trained leaves are float32 even if the base is in bfloat16.
            yield name, np.ascontiguousarray(tensor, model.config.dtype)


def _check_leaves(found: set[str], model: Model) -> None:
    """Raises a `ValueError` if the paths differ from those of the model's parameters."""
    tied = f"{HEAD}/kernel" not in found
    differing = found ^ set(flatten(abstract_params(model.config, tied=tied)))
    if differing:
        raise ValueError(
            f"saving: unexpected or missing leaf {min(differing)!r}; "
            "these are not the model's parameters"
        )


def _write(
    folder: str | Path,
    tensors: Iterator[Tensor],
    model: Model,
    *,
    shard_bytes: int,
    others: Literal["refuse", "keep"] = "refuse",
    fields: Mapping[str, Any] = MappingProxyType({}),
    card: str | None = None,
) -> None:
    """Writes the folder; `fields` are added to the model's own config.json."""
    if not model.hf_config:
        raise ValueError("saving: the model has no hf_config, so there is no config.json to write")
    if _is_source(folder, model):
        raise ValueError(f"{folder} is where the model was loaded from; give another folder")
    # The new model may have fewer shards than an old one in the folder, no index, or a tokenizer in
    # other files.
    replaces = ("model*.safetensors", INDEX, "generation_config.json", *ALL_FILES)
    with new_folder(folder, replaces=replaces, others=others) as new:
        files, dtype = _write_shards(new, tensors, shard_bytes)
        _write_json(new / "config.json", _config(model, files, dtype) | dict(fields))
        if len(files) > 1:
            _write_json(new / INDEX, _index(files))
        generation_config = _generation_config(model)
        if generation_config:
            _write_json(new / "generation_config.json", generation_config)
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, new)
        if card is not None:
            write_card(new, card, target=folder)


def _is_source(folder: str | Path, model: Model) -> bool:
    """Whether the model was loaded from there."""
    if is_hub(folder):
        return repo_id(folder) == model.source
    return Path(folder).resolve() == Path(model.source or " ").resolve()


def _config(model: Model, files: Files, dtype: str) -> dict[str, Any]:
    """The config.json of the tensors in these files."""
    config = dict(model.hf_config)
    # transformers 5 writes `dtype`; an older `torch_dtype` beside it could contradict it.
    config.pop("torch_dtype", None)
    # The caller sets this mark again if it holds for the new checkpoint.
    config.pop(WITHOUT_START, None)
    # What is written is a text model of its own.
    config.pop(PART_OF, None)
    config["tie_word_embeddings"] = not any("lm_head.weight" in sizes for sizes in files.values())
    config["dtype"] = dtype
    return config


def _generation_config(model: Model) -> dict[str, Any]:
    """The generation_config.json: the model's own, with every token that ends an answer here.

    transformers and vLLM stop at its eos_token_id only, which often lacks the end-of-turn token.
    """
    config = dict(model.generation_config)
    stops = ids_that_stop(model.tokenizer, model.hf_config, config)
    if not stops:
        return config
    if not config:
        # Without this file, transformers takes these from config.json; with it, it does not.
        for name in ("bos_token_id", "pad_token_id"):
            if model.hf_config.get(name) is not None:
                config[name] = model.hf_config[name]
    config["eos_token_id"] = _eos_token_id(config.get("eos_token_id"), stops)
    return config


def _eos_token_id(given: Any, stops: Sequence[int]) -> int | list[int]:
    """The stops as transformers writes them; the given ones stay first, in their order."""
    if not isinstance(given, list | tuple):
        given = [] if given is None else [given]
    ids = [*given, *(i for i in stops if i not in given)]
    if len(ids) == 1:
        return int(ids[0])
    return ids


def _index(files: Files) -> dict[str, Any]:
    """The index of a checkpoint in several files."""
    total = 0
    weight_map: dict[str, str] = {}
    for file, sizes in files.items():
        total += sum(sizes.values())
        weight_map |= dict.fromkeys(sizes, file)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_shards(folder: Path, tensors: Iterator[Tensor], shard_bytes: int) -> tuple[Files, str]:
    """Writes the tensors; returns what each file holds, and the dtype of the embedding table."""
    shards: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}
    dtype = ""

    def flush() -> None:
        # A preliminary name: the final one contains the number of files.
        file = folder / str(len(shards))
        # transformers 4 refuses a file without this metadata.
        save_file(held, file, metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in tensors:
        size = sum(t.nbytes for t in held.values())
        if held and size + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        if name.endswith("embed_tokens.weight"):
            dtype = str(tensor.dtype)
    flush()

    files = {}
    for i, sizes in enumerate(shards):
        name = _shard_name(i, len(shards))
        preliminary = folder / str(i)
        preliminary.rename(folder / name)
        files[name] = sizes
    return files, dtype


def _shard_name(i: int, count: int) -> str:
    """transformers' name of the i-th of `count` files."""
    if count == 1:
        return WEIGHTS
    stem = WEIGHTS.removesuffix(".safetensors")
    return f"{stem}-{i + 1:05}-of-{count:05}.safetensors"


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
