"""Our trees as Hugging Face checkpoints: safetensors in shards, config, generation config and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from lorax_ft.interop.folder import new_folder
from lorax_ft.interop.huggingface import INDEX, WEIGHTS, Names, abstract_params, family_names, hf_names
from lorax_ft.interop.tokenizer import save_tokenizer
from lorax_ft.lowrank.merge import merged_leaves
from lorax_ft.models.model import Model
from lorax_ft.tree import Tree, flatten

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
    if not model.hf_config:
        raise ValueError("save_model: the model has no hf_config, so there is no config.json to write")
    if Path(folder).resolve() == Path(model.source or " ").resolve():
        raise ValueError(f"{folder} is where the model was loaded from; give another folder")
    with new_folder(folder, replaces=("model*.safetensors", INDEX), others=others) as new:  # an old model's shards
        files, tied, kind = _write_shards(new, _tensors(params, model, dtype), shard_bytes)
        written = {"tie_word_embeddings": tied, "dtype": kind}
        _write_json(new / "config.json", {k: v for k, v in model.hf_config.items() if k != "torch_dtype"} | written)
        if len(files) > 1:
            total = sum(size for names in files.values() for size in names.values())
            weight_map = {name: file for file, names in files.items() for name in names}
            _write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        if model.generation_config:
            _write_json(new / "generation_config.json", dict(model.generation_config))
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, new)


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
    strange = found ^ set(flatten(abstract_params(model.config, tied="lm_head/kernel" not in found)))
    if strange:
        raise ValueError(
            f"save_model: unexpected or missing leaf {min(strange)!r}; these are not the model's parameters"
        )


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
