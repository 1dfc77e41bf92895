"""What is in a PEFT adapter folder: its tensors under PEFT's names, and its adapter_config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from lorax_ft.interop.huggingface import LEAVES, family_names, hf_module, stacks_experts
from lorax_ft.interop.peft_config import CONFIG, WEIGHTS, is_fused
from lorax_ft.interop.peft_methods import Matrix, PeftMethod, method_of_matrix
from lorax_ft.interop.peft_stacks import (
    one_expert,
    stack_tensors,
    stacked,
    target_parameters,
    without_experts,
    wrappers,
)
from lorax_ft.interop.peft_tensors import PREFIX
from lorax_ft.interop.text_part import peft_place
from lorax_ft.models.model import TABLE, Model

Tensors = dict[str, np.ndarray]
Contents = tuple[Tensors, dict[str, Any]]
"""The tensors of a folder, and its adapter_config.json."""
BIASES = ("none", "lora_only", "all")
"""PEFT's values of `bias`: which biases train beside the adapters, from none to all."""


class _Adapted(NamedTuple):
    """The adapters of a folder."""

    tensors: Tensors
    by_module: dict[str, Matrix]
    """By Hugging Face's name of the module or parameter."""
    parameters: set[str]
    """Those of the names that PEFT targets as parameters, not as modules."""


class _Whole(NamedTuple):
    """The modules of a folder that were trained in full, and the biases."""

    tensors: Tensors
    modules: set[str]
    biases: str
    """One of `BIASES`."""


def folder_contents(
    adapters: Mapping[str, Matrix],
    whole: Mapping[str, np.ndarray],
    *,
    known: Iterable[str],
    model: Model,
    base: str | Path | None,
    dropout: float,
    shared: Mapping[str, np.ndarray],
) -> Contents:
    """The tensors and the config of a folder that holds what `collect_adapters` returns.

    `known` are Hugging Face's names of all modules, `shared` the leaves that all layers share.
    """
    method = method_of_matrix(next(iter(adapters.values())))
    adapters = method.fit(adapters)
    has_fused = any(map(is_fused, adapters))
    stacks: dict[str, Matrix] = {}
    if stacks_experts(model.hf_config):
        adapters, stacks = _with_stacks(adapters, model)
    adapted = _adapted(adapters, stacks, method, model)
    trained = _whole(adapters, whole, model)
    config = {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": str(base or model.source) or None,
        "modules_to_save": sorted(trained.modules) or None,
        **target_parameters(method.config(adapted.by_module, known), adapted.parameters),
    }
    if "lora_invocation" in shared:
        config["alora_invocation_tokens"] = np.asarray(shared["lora_invocation"]).tolist()
    if trained.biases != "none":
        config["bias"] = trained.biases
    if method.dropout is not None:
        # PEFT has no dropout for experts, and refuses the folder. It only acts in training.
        config[method.dropout] = 0.0 if has_fused else dropout
    tensors = {}
    for name, tensor in {**adapted.tensors, **trained.tensors}.items():
        tensors[PREFIX + name] = np.ascontiguousarray(tensor)
    for name, leaf in method.shared.items():
        tensors[name] = np.ascontiguousarray(np.asarray(shared[leaf]).T)
    return tensors, config


def write_contents(new: Path, contents: Contents) -> None:
    """Write the two files of a folder that exists."""
    tensors, config = contents
    (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})


def _adapted(
    adapters: Mapping[str, Matrix],
    stacks: Mapping[str, Matrix],
    method: PeftMethod,
    model: Model,
) -> _Adapted:
    """The adapters of modules by their paths, and those of stacks of experts by their names."""
    names = family_names(model.hf_config)
    place = peft_place(model.hf_config)
    has_stacks = stacks_experts(model.hf_config)
    by_module = {name: one_expert(stack) for name, stack in stacks.items()}
    parameters = set(stacks)
    tensors: Tensors = {}
    for name, wrapper in wrappers(stacks).items():
        for suffix, value in stack_tensors(stacks[name]).items():
            tensors[f"{wrapper}.{suffix}"] = value
    for path, matrix in adapters.items():
        module = hf_module(path, names, place=place)
        name = module
        if has_stacks and path.endswith("mlp/gate"):
            # This router is no linear module in transformers.
            name = f"{module}.weight"
            parameters.add(name)
        by_module[name] = matrix
        for suffix, value in method.tensors(matrix, path == TABLE).items():
            tensors[f"{module}.{suffix}"] = value
    return _Adapted(tensors, by_module, parameters)


def _whole(adapters: Mapping[str, Matrix], whole: Mapping[str, np.ndarray], model: Model) -> _Whole:
    """What was trained in full; the biases of adapted modules lie in their base layer."""
    names = family_names(model.hf_config)
    place = peft_place(model.hf_config)
    tensors: Tensors = {}
    trained_modules = set()
    biases = "none"
    for path, weight in whole.items():
        parent, _, leaf = path.rpartition("/")
        module = hf_module(parent, names, place=place)
        if parent in adapters:
            module = f"{module}.base_layer"
            biases = max("lora_only", biases, key=BIASES.index)
        elif leaf == "bias" and f"{parent}/kernel" not in whole:
            biases = "all"
        else:
            trained_modules.add(module)
        tensors[f"{module}.{LEAVES.get(leaf, leaf)}"] = weight
    return _Whole(tensors, trained_modules, biases)


def _with_stacks(
    adapters: Mapping[str, Matrix],
    model: Model,
) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """The adapters that are not on experts, and those of stacks by the parameter's full name."""
    assert model.config.experts
    names = family_names(model.hf_config)
    place = peft_place(model.hf_config)
    others, by_stack = without_experts(adapters)
    stacks = {}
    for path, experts in by_stack.items():
        module, _, stack = path.rpartition("/")
        parameter = f"{hf_module(module, names, place=place)}.{stack}"
        stacks[parameter] = stacked(path, experts, model.config.experts.count)
    return others, stacks
