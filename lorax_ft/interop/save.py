"""Our trees as Hugging Face checkpoints: safetensors in shards, config, generation config and tokenizer."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np
from safetensors.numpy import save_file

from lorax_ft.interop.bitsandbytes import packed_tensors, packing_config
from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.huggingface import (
    INDEX,
    WEIGHTS,
    Names,
    abstract_params,
    family_names,
    hf_names,
)
from lorax_ft.interop.tokenizer import save_tokenizer
from lorax_ft.lowrank.linear import ADAPTER_LEAVES, STEP_LEAVES
from lorax_ft.lowrank.merge import merged_leaves
from lorax_ft.lowrank.requantize import is_requantized
from lorax_ft.models.model import WITHOUT_START, Model
from lorax_ft.quant.double import DoubleQuantized
from lorax_ft.quant.int8 import Int8
from lorax_ft.quant.nf4 import NF4
from lorax_ft.tree import Tree, flatten, modules

SHARD_BYTES = 5 * 10**9
Tensor = tuple[str, np.ndarray]


def save_model(
    folder: str | Path,
    params: Tree,
    model: Model,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    others: Literal["refuse", "keep"] = "refuse",
) -> None:
    """Writes `params` as a checkpoint that transformers loads, with the model's config and tokenizer.

    Adapters in `params` are merged as they are written, a leaf at a time; a head that then differs from the
    embedding table is written too, and the model becomes untied.

    Args:
      folder: written beside and renamed.
      params: parameters, with or without adapters.
      model: gives config and tokenizer.
      dtype: of the tensors written; None keeps each as it is.
      shard_bytes: the most that a file holds; above it there are several, and an index.
      others: what becomes of files of other names in the folder, beside an old model's.

    Raises:
      ValueError: `params` are not the model's, the model has no `hf_config`, or the folder holds other files or the
        model itself.
      OSError: the disk is full, or may not be written.
    """
    _write(folder, _tensors(params, model, dtype), model, shard_bytes=shard_bytes, others=others)


def save_quantized(
    folder: str | Path, params: Tree, model: Model, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the base in `params`, with kernels in NF4, as a checkpoint that transformers loads with bitsandbytes.

    The base is written as it stands beside the adapters, bit by bit: where an init changed it (PiSSA, LoftQ, OLoRA),
    without the start, as `save_peft(base=folder)` takes it to be. Adapters are left out.
    transformers 5 has no 4-bit experts: a base with experts is for this library.

    Args:
      folder: written beside and renamed.
      params: parameters, with or without adapters.
      model: gives config and tokenizer.
      shard_bytes: as in `save_model`.

    Raises:
      ValueError: no kernel is in NF4, or one is in int8; and as `save_model`.
      OSError: the disk is full, or may not be written.
    """
    beside = ADAPTER_LEAVES | STEP_LEAVES
    leaves = {
        path: leaf
        for path, leaf in flatten(params).items()
        if path.rpartition("/")[2] not in beside
    }
    packed = [leaf for leaf in leaves.values() if isinstance(leaf, NF4)]
    if not packed or any(isinstance(leaf, Int8) for leaf in leaves.values()):
        raise ValueError(
            "save_quantized writes bases with kernels in NF4 (quant.format nf4); save_model writes others"
        )
    plain = {
        path: leaf
        for path, leaf in leaves.items()
        if path.endswith("/kernel") and not isinstance(leaf, NF4)
    }
    names = family_names(model.hf_config)
    skipped = [
        name for path, leaf in plain.items() for name, _ in hf_names(path, leaf.shape, names)
    ]
    packing = packing_config(
        double_quant=isinstance(packed[0].absmax, DoubleQuantized),
        dtype=model.config.dtype,
        skipped=sorted({"lm_head", *(name.removesuffix(".weight") for name in skipped)}),
    )
    fields: dict[str, Any] = {"quantization_config": packing, "dtype": model.config.dtype}
    if model.without_start or any(map(is_requantized, modules(params).values())):
        fields[WITHOUT_START] = True
    _write(folder, _quantized_tensors(leaves, model), model, shard_bytes=shard_bytes, fields=fields)


def hf_tensors(path: str, leaf: np.ndarray, names: Names) -> Iterator[Tensor]:
    """The tensors of a leaf under the checkpoint's names, in its orientation."""
    for name, index in hf_names(path, leaf.shape, names):
        yield name, leaf[index].T if path.endswith("/kernel") else leaf[index]


def _tensors(params: Tree, model: Model, dtype: str | None) -> Iterator[Tensor]:
    """The checkpoint's tensors, one at a time."""
    names, found = family_names(model.hf_config), set()
    for path, leaf in merged_leaves(params, layout=model.layout):
        found.add(path)
        for name, value in hf_tensors(path, np.asarray(leaf), names):
            yield name, np.ascontiguousarray(value, dtype)
    _check_leaves(found, model)


def _quantized_tensors(leaves: dict[str, Any], model: Model) -> Iterator[Tensor]:
    """The tensors of a checkpoint in NF4, one at a time."""
    _check_leaves(set(leaves), model)
    names = family_names(model.hf_config)
    for path, leaf in leaves.items():
        host = jax.tree.map(np.asarray, leaf)
        if isinstance(leaf, NF4):
            for name, index in hf_names(path, leaf.shape, names):
                yield from packed_tensors(name, jax.tree.map(operator.itemgetter(index), host))
        else:
            own = hf_tensors(
                path, host, names
            )  # what trains whole is float32 beside a bfloat16 base
            yield from (
                (name, np.ascontiguousarray(value, model.config.dtype)) for name, value in own
            )


def _check_leaves(found: set[str], model: Model) -> None:
    strange = found ^ set(
        flatten(abstract_params(model.config, tied="lm_head/kernel" not in found))
    )
    if strange:
        raise ValueError(
            f"saving: unexpected or missing leaf {min(strange)!r}; these are not the model's parameters"
        )


def _write(
    folder: str | Path,
    tensors: Iterator[Tensor],
    model: Model,
    *,
    shard_bytes: int,
    others: Literal["refuse", "keep"] = "refuse",
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes the folder; `fields` go into its config.json beside the model's own."""
    if not model.hf_config:
        raise ValueError("saving: the model has no hf_config, so there is no config.json to write")
    if Path(folder).resolve() == Path(model.source or " ").resolve():
        raise ValueError(f"{folder} is where the model was loaded from; give another folder")
    with new_folder(
        folder, replaces=("model*.safetensors", INDEX), others=others
    ) as new:  # an old model's shards
        files, tied, kind = _write_shards(new, tensors, shard_bytes)
        written = {"tie_word_embeddings": tied, "dtype": kind, **fields}
        dropped = ("torch_dtype", WITHOUT_START)
        _write_json(
            new / "config.json",
            {k: v for k, v in model.hf_config.items() if k not in dropped} | written,
        )
        if len(files) > 1:
            total = sum(size for names in files.values() for size in names.values())
            weight_map = {name: file for file, names in files.items() for name in names}
            _write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        if model.generation_config:
            _write_json(new / "generation_config.json", dict(model.generation_config))
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, new)


def _write_shards(
    folder: Path, tensors: Iterator[Tensor], shard_bytes: int
) -> tuple[dict[str, dict[str, int]], bool, str]:
    """Writes files; returns the bytes of their tensors by name, whether the head is tied, and the tensors' dtype."""
    shards: list[dict[str, int]] = []
    held: dict[str, np.ndarray] = {}
    kind = ""

    def flush() -> None:
        save_file(held, folder / str(len(shards)), metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        kind = str(tensor.dtype) if name.endswith("embed_tokens.weight") else kind
    flush()
    stem = WEIGHTS.removesuffix(".safetensors")
    files = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [WEIGHTS]
    for i, file in enumerate(files):
        (folder / str(i)).rename(folder / file)
    tied = not any("lm_head.weight" in names for names in shards)
    return dict(zip(files, shards, strict=True)), tied, kind


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
