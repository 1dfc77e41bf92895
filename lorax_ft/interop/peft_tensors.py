"""The tensors of a PEFT folder, each as one module of the checkpoint has it.

transformers 5 stacks the experts of a layer, and PEFT adapts the stacks as `target_parameters`: A
of all experts is one tensor `[E·R, I]`, experts first, and B is `[O, R·E]`, ranks first. A module
is wrapped once for each of its parameters, the first one innermost: where both are adapted,
`mlp.experts.base_layer.lora_A.weight` is gate_up_proj's and `mlp.experts.lora_A.weight` is
down_proj's. Gate and up are one parameter, with one A and halves of B.

Shapes: E experts, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_ft.interop.expert_stacks import STACKS
from lorax_ft.interop.huggingface import family_names, hf_module, stacks_experts
from lorax_ft.interop.lazy_tensor import all_finite, lazy_tensors
from lorax_ft.interop.peft_config import WEIGHTS, is_target
from lorax_ft.interop.peft_methods import LORA, PeftMethod
from lorax_ft.models.model import Model
from lorax_ft.tree import Layer

PREFIX = "base_model.model."
TENSOR = "trainable_tokens_delta"
"""The rows of trainable tokens (`lorax_ft.interop.peft_tokens`)."""
FIELD = "trainable_token_indices"
"""Their ids, in a LoRA's adapter_config.json."""
WRAPPER = ".token_adapter"
"""What PEFT puts between a module's name and its tensors where its tokens train beside LoRA."""
OWN_SUFFIXES = {
    # The table under trainable tokens, which PEFT saves where the vocabulary has grown.
    f"{WRAPPER}.base_layer.weight": "base",
    # The weight under an adapted embedding, which PEFT saves beside the adapter.
    ".base_layer.weight": "base",
    # The bias of an adapted module that trains beside the adapter: bias="lora_only" or "all".
    ".base_layer.bias": "bias",
    ".weight": "whole",
    ".bias": "bias",
}
"""A module's own tensors, which are trained in full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of one module."""

    key: str
    """Its name in the file, for errors."""
    module: str
    """The module's name in the checkpoint."""
    target: str
    """The name that PEFT's patterns of ranks and alphas are matched with."""
    leaf: str
    """One of the values of `OWN_SUFFIXES`, or of the method's suffixes."""
    value: np.ndarray
    """In PEFT's orientation."""


def adapter_tensors(
    folder: Path,
    config: Mapping[str, Any],
    method: PeftMethod,
    model: Model,
) -> Iterator[Entry]:
    """The tensors of a folder, with stacked experts split into one tensor for each expert.

    Args:
      folder: of an adapter.
      config: its adapter_config.json.
      method: its type.
      model: the adapter's base, whose family has the checkpoint's names.

    Raises:
      ValueError: the file is damaged, or holds a tensor that is not of the adapter's type, or a
        number that is not finite.
    """
    for key, lazy in sorted(lazy_tensors(folder / WEIGHTS, dtypes=method.dtypes).items()):
        of_tokens = key.endswith(f".{TENSOR}") and config.get(FIELD)
        if key in method.shared or of_tokens:
            continue
        module, leaf = _parse(key, method, folder)
        target = module
        if is_target(f"{module}.weight", config.get("target_parameters")):
            target = f"{module}.weight"
        entry = Entry(key=key, module=module, target=target, leaf=leaf, value=lazy.read(()))
        if not all_finite(entry.value):
            raise ValueError(
                f"{folder}: {key} holds values that are not finite; is the file damaged, or did "
                "its training diverge?"
            )
        if model.config.experts and ".mlp." in module and method is LORA:
            yield from _expert_entries(entry, config, model, where=folder)
        else:
            yield entry


def shared_tensors(folder: Path, method: PeftMethod) -> Layer:
    """The leaves that all modules share.

    Raises:
      ValueError: the file lacks one, or it is no matrix.
    """
    tensors = lazy_tensors(folder / WEIGHTS, dtypes=method.dtypes)
    leaves: Layer = {}
    for key, name in method.shared.items():
        if key not in tensors:
            raise ValueError(f"{folder}: {WEIGHTS} has no {key}, which all modules share")
        value = tensors[key].read(())
        if value.ndim != 2:
            raise ValueError(f"{folder}: {key} has the shape {value.shape}; it must be a matrix")
        leaves[name] = jnp.asarray(value.T, jnp.float32)
    return leaves


def _parse(key: str, method: PeftMethod, folder: Path) -> tuple[str, str]:
    """The module's name and the leaf that a tensor of the folder is."""
    suffixes = {**method.suffixes, **OWN_SUFFIXES}
    for suffix, leaf in suffixes.items():
        if key.startswith(PREFIX) and key.endswith(suffix):
            return key.removeprefix(PREFIX).removesuffix(suffix), leaf
    raise ValueError(
        f"{folder} holds the tensor {key}, which does not belong to a {method.peft_type} adapter"
    )


def _expert_entries(
    entry: Entry,
    config: Mapping[str, Any],
    model: Model,
    *,
    where: Path,
) -> Iterator[Entry]:
    """The entries of single modules in one of a sparse MLP.

    Its modules have other names in transformers' memory than in checkpoints.
    """
    assert model.config.experts
    names = family_names(model.hf_config)
    module = entry.module.replace(".base_layer", "")
    path = module.removeprefix("model.").replace(".", "/")
    parameters = config.get("target_parameters")
    adapted = [name for name in STACKS if is_target(f"{module}.{name}", parameters)]
    # The first parameter is the innermost, so the number of wrappers counts from the last.
    wrappers = entry.module.count(".base_layer")
    if not module.endswith(".experts") or wrappers >= len(adapted):
        yield dataclasses.replace(entry, module=hf_module(path, names))
        return
    parameter = adapted[-1 - wrappers]
    stacks = _split_stack(
        entry,
        model.config.experts.count,
        STACKS[parameter],
        alternating=stacks_experts(model.hf_config),
        where=where,
    )
    for name, values in stacks.items():
        for i, value in enumerate(values):
            expert = hf_module(f"{path}/{i}/{name}", names)
            yield dataclasses.replace(
                entry,
                module=expert,
                target=f"{module}.{parameter}",
                value=value,
            )


def _split_stack(
    entry: Entry,
    count: int,
    names: tuple[str, ...],
    *,
    alternating: bool,
    where: Path,
) -> dict[str, np.ndarray]:
    """A `[E, R, I]` or B `[E, O, R]` of each of the modules in one parameter.

    Their rows of B alternate, or stand one module's after the other's.
    """
    *_, rows, columns = entry.value.shape
    if entry.leaf == "lora_a" and rows % count == 0:
        a = entry.value.reshape(count, -1, columns)  # [E, R, I]
        # Gate and up share A.
        return dict.fromkeys(names, a)
    if entry.leaf == "lora_b" and columns % count == 0 and rows % len(names) == 0:
        b = entry.value.reshape(rows, -1, count)  # [O, R, E]
        b = b.transpose(2, 0, 1)  # [E, O, R]
        parts = np.split(b, len(names), axis=1)
        if alternating:
            parts = [b[:, first :: len(names)] for first in range(len(names))]
        return dict(zip(names, parts, strict=True))
    raise ValueError(
        f"{where}: {entry.key} has the shape {entry.value.shape}, which does not fit {count} "
        "experts"
    )
