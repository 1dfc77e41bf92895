"""The tensors of a PEFT folder, each as one module of the checkpoint has it.

transformers 5 stacks the experts of a layer, and PEFT adapts the stacks as `target_parameters`: A of all experts is
one tensor `[E·R, I]`, experts first, and B is `[O, R·E]`, ranks first. A module is wrapped once for each of its
parameters, the first one innermost: where both are adapted, `mlp.experts.base_layer.lora_A.weight` is gate_up_proj's
and `mlp.experts.lora_A.weight` is down_proj's. Gate and up are one parameter, with one A and halves of B.

Shapes: E experts, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.huggingface import family_names, hf_module
from lorax_ft.interop.lazy_tensor import lazy_tensors
from lorax_ft.interop.peft_config import is_target
from lorax_ft.models.model import Model

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {
    ".lora_A.weight": "lora_a",
    ".lora_B.weight": "lora_b",
    ".lora_embedding_A": "lora_a",
    ".lora_embedding_B": "lora_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",  # as some versions of PEFT wrote it
    ".base_layer.weight": "base",  # the weight under an adapted embedding, which PEFT writes beside the adapter
    ".weight": "whole",
    ".bias": "bias",
}
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The parameters of stacked experts, in their order, and our modules in each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of one module."""

    key: str
    """Its name in the file, for errors."""
    module: str
    """The module's name in the checkpoint."""
    target: str
    """What PEFT's patterns of ranks and alphas see as its name."""
    leaf: str
    """One of the values of `SUFFIXES`."""
    value: np.ndarray
    """In PEFT's orientation."""


def adapter_tensors(folder: Path, config: Mapping[str, Any], model: Model) -> Iterator[Entry]:
    """The tensors of a folder, with those of stacked experts taken apart.

    Args:
      folder: of an adapter.
      config: its adapter_config.json.
      model: the adapter's base, whose family has the checkpoint's names.

    Raises:
      ValueError: the file is damaged, or holds something that is no LoRA's.
    """
    for key, stored in sorted(lazy_tensors(folder / WEIGHTS).items()):
        module, leaf = _parse(key, folder)
        target = _parameter(module, config)
        entry = Entry(key=key, module=module, target=target, leaf=leaf, value=stored.read(()))
        sparse = model.config.experts and ".mlp." in module
        yield from _sparse(entry, config, model, where=folder) if sparse else [entry]


def _parse(key: str, folder: Path) -> tuple[str, str]:
    """The module's name and the leaf that a tensor of the folder is."""
    for suffix, leaf in SUFFIXES.items():
        if key.startswith(PREFIX) and key.endswith(suffix):
            return key.removeprefix(PREFIX).removesuffix(suffix), leaf
    raise ValueError(f"{folder} holds the tensor {key}, which is not LoRA's")


def _parameter(module: str, config: Mapping[str, Any]) -> str:
    """The module, or its weight where that is what PEFT adapted."""
    return (
        f"{module}.weight"
        if is_target(f"{module}.weight", config.get("target_parameters"))
        else module
    )


def _sparse(
    entry: Entry, config: Mapping[str, Any], model: Model, *, where: Path
) -> Iterator[Entry]:
    """The entries of single modules in one of a sparse MLP, whose modules have other names in memory than in files."""
    assert model.config.experts
    count, names = model.config.experts.count, family_names(model.hf_config)
    module = entry.module.replace(".base_layer", "")
    path = module.removeprefix("model.").replace(".", "/")
    adapted = [
        name for name in STACKS if is_target(f"{module}.{name}", config.get("target_parameters"))
    ]
    inside = entry.module.count(".base_layer")
    if not module.endswith(".experts") or inside >= len(adapted):
        yield dataclasses.replace(entry, module=hf_module(path, names))
        return
    parameter = adapted[-1 - inside]
    for name, values in _apart(entry, count, STACKS[parameter], where=where).items():
        for i, value in enumerate(values):
            expert = hf_module(f"{path}/{i}/{name}", names)
            yield dataclasses.replace(
                entry, module=expert, target=f"{module}.{parameter}", value=value
            )


def _apart(
    entry: Entry, count: int, names: tuple[str, ...], *, where: Path
) -> dict[str, np.ndarray]:
    """A `[E, R, I]` or B `[E, O, R]` of each of the modules in one parameter."""
    *_, rows, columns = entry.value.shape
    if entry.leaf == "lora_a" and rows % count == 0:
        return dict.fromkeys(names, entry.value.reshape(count, -1, columns))
    if entry.leaf == "lora_b" and columns % count == 0 and rows % len(names) == 0:
        b = entry.value.reshape(rows, -1, count).transpose(2, 0, 1)
        return dict(zip(names, np.split(b, len(names), axis=1), strict=True))
    raise ValueError(
        f"{where}: {entry.key} has the shape {entry.value.shape}, which is none of {count} experts"
    )
