"""What all types of PEFT's adapter_config.json have in common.

A file is the adapter or the soft prompt of a config; the other sections are ours. The weights
beside it are not read: `adapter.continue_from` takes them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping

from lorax_ft.config.foreign.rules import (
    KINDS,
    Keys,
    Kind,
    Options,
    Rule,
    holds,
    is_kind,
    refused,
    same,
    shown,
    together,
    unused,
)

NAME = "PEFT"

given = functools.partial(together, absent=False)
"""A rule of keys that says nothing where the file has none of them."""


def kind(options: Options) -> Rule:
    """The rule of a type: the options that it sets by itself."""

    def apply(keys: Keys) -> Options:
        task = keys.read("task_type", "text", "CAUSAL_LM")
        if task.upper() != "CAUSAL_LM":
            raise keys.error(
                "task_type",
                f"task_type {shown(task)} cannot be run: CAUSAL_LM only; no option changes that",
            )
        return dict(options)

    return together(apply, *options, remark="CAUSAL_LM only", others_hold=True)


def base(keys: Keys) -> Options:
    """The base model."""
    key = "base_model_name_or_path"
    path = keys.read(key, "text")
    if not path:
        state = keys.state(key) or "empty"
        keys.note(key, f"{state}, so the tiny model that comes with lorax_ft; give --model.path")
        return {}
    return {"model.path": path}


def targets(keys: Keys) -> Options:
    """The modules to adapt."""
    key = "target_modules"
    if not keys.given(key):
        keys.note(key, f"{keys.state(key)}, so all linear layers; PEFT chooses by the model")
        return {}
    named = modules(keys, key)
    # Those of target_parameters are refused, or replaced by an option.
    if not named and not keys.read("target_parameters", "any"):
        value = json.dumps(keys.read(key, "any"))
        raise keys.error(
            key, f"{key} is {value}, so nothing would train; name modules, or give all-linear"
        )
    return {"adapter.targets": named}


def excluded(keys: Keys) -> Options:
    """The modules to leave out."""
    return {"adapter.exclude": modules(keys, "exclude_modules")}


def layers(keys: Keys) -> Options:
    """The layers to adapt."""
    value = keys.read("layers_to_transform", "any", [])
    return {"adapter.layers": tuple(value) if isinstance(value, list) else (value,)}


def ranks(keys: Keys) -> Options:
    """The ranks of single modules."""
    return {"adapter.rank_pattern": _patterns(keys, "rank_pattern", "count")}


def alphas(keys: Keys) -> Options:
    """The alphas of single modules."""
    return {"adapter.alpha_pattern": _patterns(keys, "alpha_pattern", "number")}


def modules(keys: Keys, key: str) -> tuple[str, ...]:
    """The patterns of modules: a list of names, or one regular expression."""
    value = keys.read(key, "any")
    if isinstance(value, str) and value:
        return ("all-linear",) if value.lower() == "all-linear" else (_pattern(value),)
    if value == "":
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise keys.error(key, f"{key} is {value!r:.80}; it must be names or a regular expression")
    return tuple(_without_root(name) for name in value if name)


def tokens(keys: Keys, key: str) -> Options:
    """The tokens that train, the same ones in the embedding and the head."""
    value = keys.read(key, "any")
    lists = list(value.values()) if isinstance(value, dict) else [value]
    first = lists[0] if lists else []
    valid = isinstance(first, list) and all(type(token) is int for token in first)
    if not valid or any(other != first for other in lists):
        raise keys.error(key, f"{key} is {value!r:.80}; it must be one list of ids")
    return {"adapter.trainable_tokens": tuple(first)}


SHARED: Mapping[str, Rule] = {
    "base_model_name_or_path": together(base, "model.path"),
    "revision": same("model.revision", "text"),
    "modules_to_save": same("adapter.train_whole", "names"),
    "auto_mapping": holds("the model's family is found by its config.json"),
    "inference_mode": holds("what a run adds trains"),
    "peft_version": holds("the file's version"),
}
"""The keys of every type."""
ADAPTER: Mapping[str, Rule] = {
    **SHARED,
    "target_modules": together(
        targets,
        "adapter.targets",
        remark="names or a regular expression; absent: all linear layers",
    ),
    "exclude_modules": given(excluded, "adapter.exclude"),
    "layers_to_transform": given(layers, "adapter.layers"),
    "layers_pattern": holds("layers are found by their numbers"),
    "bias": refused("biases do not train beside an adapter", harmless=("none",)),
    "fan_in_fan_out": holds("a kernel's axes are those of the model"),
    "runtime_config": holds("it is about PyTorch"),
    "ensure_weight_tying": unused("tied weights stay tied"),
}
"""The keys of every type that adapts modules."""


def _patterns(keys: Keys, key: str, kind: Kind) -> tuple[str, ...]:
    """Entries "pattern=value" of a table of PEFT, which may leave out the first parts of a name."""
    entries = []
    for pattern, value in keys.read(key, "object").items():
        if not is_kind(value, kind):
            problem = f"{key}: {shown(pattern)} is {value!r:.80}; it must be {KINDS[kind]}"
            raise keys.error(key, problem)
        is_name = re.fullmatch(r"[\w.]+", pattern) is not None
        own = _without_root(pattern) if is_name else rf"(.*\.)?({_pattern(pattern)})"
        entries.append(f"{own}={int(value) if value == int(value) else value}")
    return tuple(entries)


def _without_root(name: str) -> str:
    """A module's name without the model's own, which our names do not have."""
    return re.sub(r"^(base_model\.model\.)?model\.(?=.)", "", name)


def _pattern(pattern: str) -> str:
    """A regular expression of PEFT's names as one of ours: without the name of the model."""
    return re.sub(r"^\^?(base_model\\?\.model\\?\.)?model\\?\.(?=.)", "", pattern)
