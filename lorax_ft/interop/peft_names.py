"""Hugging Face's names of the modules of a model, and where each stands in the tree."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorax_ft.interop.huggingface import family_names, hf_module, stacks_experts, unstacked
from lorax_ft.interop.peft_stacks import every_stack
from lorax_ft.interop.text_part import peft_place
from lorax_ft.models.model import HEAD, Model
from lorax_ft.tree import Tree, modules

Place = tuple[str, tuple[int, ...]]
"""The path of a module, and the index of one matrix in its stack."""


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


def known_modules(
    model: Model,
    params: Tree,
    *,
    place: str = "model",
    blocks: Iterable[str] = (),
) -> dict[str, Place]:
    """Where the modules of the model stand, by Hugging Face's names.

    `blocks` are the paths of those that have no leaves of their own.
    """
    experts = 1
    if model.config.experts:
        experts = model.config.experts.count
    layers = model.config.layers // model.config.period
    stack = (layers, experts)
    names = family_names(model.hf_config)
    known = {}
    # A tied head is not in the tree, but a folder may untie it.
    for path in dict.fromkeys((HEAD, *blocks, *modules(params))):
        for logical, index in unstacked(path, stack):
            known[hf_module(logical, names, place=place)] = (path, index)
    return known


def find_module(module: str, known: Mapping[str, Place], *, where: Path) -> Place:
    """The path of a module, and its index in the stack there."""
    if module in known:
        return known[module]
    near = difflib.get_close_matches(module, known, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ValueError(f"{where}: the model has no module {module}{hint}")
