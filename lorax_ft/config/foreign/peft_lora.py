"""PEFT's LoraConfig, as an adapter_config.json: the adapter section of a config.

The other sections are ours. The weights beside the file are not read: `adapter.continue_from` takes
them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from lorax_ft.config.foreign.rules import (
    Keys,
    Options,
    Rule,
    choice,
    holds,
    refused,
    same,
    together,
    unused,
)
from lorax_ft.schema import INITS

NAME = "PEFT"

_INITS = {
    True: "kaiming",
    "true": "kaiming",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "olora": "olora",
    "loftq": "loftq",
    "eva": "eva",
    "corda": "corda",
    "lora_ga": "lora_ga",
    "mica": "mica",
}
_INIT_CONFIGS: Mapping[str, tuple[str, ...]] = {
    "eva_config": ("rho",),
    "corda_config": ("corda_method",),
    "lora_ga_config": ("stable_gamma",),
    "loftq_config": ("loftq_bits", "loftq_iter"),
}
"""The objects of starts, with their keys that have an option here."""
_ONLY_LORA = "LoRA has no such part here"


def kind(keys: Keys) -> Options:
    """Raises for adapters other than LoRA, and for models that are not causal."""
    peft_type = keys.read("peft_type", "text", "LORA")
    if peft_type.upper() != "LORA":
        raise keys.error(
            "peft_type",
            f"peft_type {peft_type}: only a LoraConfig is read as a config; the folder of a "
            "trained adapter of any type is read by adapter.continue_from",
        )
    task = keys.read("task_type", "text", "CAUSAL_LM")
    if task.upper() != "CAUSAL_LM":
        raise keys.error("task_type", f"task_type {task} cannot be run: CAUSAL_LM only")
    return {}


def targets(keys: Keys) -> Options:
    """The modules to adapt."""
    return {"adapter.targets": _modules(keys, "target_modules")}


def excluded(keys: Keys) -> Options:
    """The modules to leave out."""
    return {"adapter.exclude": _modules(keys, "exclude_modules")}


def init(keys: Keys) -> Options:
    """The start of A and B."""
    value = keys.read("init_lora_weights", "any", True)
    randomized = re.fullmatch(r"pissa_niter_(\d+)", value) if isinstance(value, str) else None
    if randomized is not None:
        return {"adapter.init": "pissa", "adapter.svd_iterations": int(randomized[1])}
    if value is False:
        raise keys.error(
            "init_lora_weights",
            "init_lora_weights false: A and B both random change the model; every start here "
            "leaves it as it is",
        )
    chosen = keys.choose("init_lora_weights", _INITS, True)
    options: Options = {"adapter.init": chosen}
    frozen = INITS[chosen].frozen
    if frozen is not None:
        options["adapter.freeze"] = (frozen,)
    return options | _init_options(chosen, keys)


def _init_options(chosen: str, keys: Keys) -> Options:
    """The options of a start, which have an object of their own in PEFT."""
    own = f"{chosen}_config"
    for section, known in _INIT_CONFIGS.items():
        for name in keys.read(section, "object", {}):
            if section != own:
                keys.note(section, f"not honored: it belongs to init_lora_weights {section[:-7]}")
            elif name not in known:
                keys.note(section, f"only {' and '.join(known)} of it is honored")
    given = keys.read(own, "object", {}) if own in _INIT_CONFIGS else {}
    match chosen:
        case "eva":
            return {"adapter.eva_rho": given.get("rho", 2.0)}
        case "corda":
            return {"adapter.corda_mode": given.get("corda_method", "ipm")}
        case "lora_ga":
            return {"adapter.lora_ga_gamma": given.get("stable_gamma", 16)}
        case "loftq":
            bits = given.get("loftq_bits", 4)
            if bits not in (4, 8):
                raise keys.error("loftq_config", f"loftq_bits is {bits}; it can be 4 or 8")
            format_ = "nf4" if bits == 4 else "int8"
            return {"quant.format": format_, "quant.rounds": given.get("loftq_iter", 1)}
    return {}


def ranks(keys: Keys) -> Options:
    """The ranks of single modules."""
    return {"adapter.rank_pattern": _patterns(keys, "rank_pattern")}


def alphas(keys: Keys) -> Options:
    """The alphas of single modules."""
    return {"adapter.alpha_pattern": _patterns(keys, "alpha_pattern")}


def layers(keys: Keys) -> Options:
    """The layers to adapt."""
    value = keys.read("layers_to_transform", "any", [])
    return {"adapter.layers": tuple(value) if isinstance(value, list) else (value,)}


def trained_tokens(keys: Keys) -> Options:
    """The tokens that train, the same ones in the embedding and the head."""
    key = "trainable_token_indices"
    value = keys.read(key, "any")
    lists = list(value.values()) if isinstance(value, dict) else [value]
    first = lists[0] if lists else []
    valid = isinstance(first, list) and all(type(token) is int for token in first)
    if not valid or any(other != first for other in lists):
        raise keys.error(key, f"{key} is {value!r:.80}; it must be one list of ids")
    return {"adapter.trainable_tokens": tuple(first)}


_given = functools.partial(together, absent=False)

_KIND = together(kind, remark="LORA and CAUSAL_LM")
_INIT = _given(
    init,
    *("adapter.init", "adapter.svd_iterations", "adapter.freeze", "quant.format", "quant.rounds"),
    remark="true: kaiming; pissa_niter_N: pissa with svd_iterations N; loftq quantizes the base; "
    "of the objects only rho, corda_method, stable_gamma, loftq_bits and loftq_iter",
)

TABLE: Mapping[str, Rule] = {
    "peft_type": _KIND,
    "task_type": _KIND,
    "base_model_name_or_path": same("model.path", "text"),
    "revision": same("model.revision", "text"),
    "r": same("adapter.rank", "whole", default=8),
    "lora_alpha": same("adapter.alpha", "number", default=8),
    "lora_dropout": same("adapter.dropout", "number"),
    "target_modules": _given(targets, "adapter.targets", remark="names or a regular expression"),
    "exclude_modules": _given(excluded, "adapter.exclude"),
    "rank_pattern": _given(ranks, "adapter.rank_pattern"),
    "alpha_pattern": _given(alphas, "adapter.alpha_pattern"),
    "layers_to_transform": _given(layers, "adapter.layers"),
    "modules_to_save": same("adapter.train_whole", "names"),
    "use_rslora": choice("adapter.scaling", {True: "rank_stabilized", False: "standard"}),
    "use_dora": same("adapter.dora", "flag"),
    "init_lora_weights": _INIT,
    "eva_config": _INIT,
    "corda_config": _INIT,
    "loftq_config": _INIT,
    "lora_ga_config": _INIT,
    "bias": refused("biases do not train beside an adapter", harmless=("none",)),
    "lora_bias": refused(_ONLY_LORA),
    "target_parameters": refused("name modules in target_modules", harmless=([],)),
    "layer_replication": refused("the layers are those of the model", harmless=([],)),
    "trainable_token_indices": _given(trained_tokens, "adapter.trainable_tokens"),
    "use_qalora": refused(_ONLY_LORA),
    "use_bdlora": refused(_ONLY_LORA),
    "alora_invocation_tokens": refused("give their text as adapter.invocation", harmless=([],)),
    "arrow_config": refused(_ONLY_LORA),
    "kasa_config": refused(_ONLY_LORA),
    "velora_config": refused(_ONLY_LORA),
    "monteclora_config": refused(_ONLY_LORA),
    "megatron_config": refused("Megatron's layers are not used"),
    "megatron_core": holds("Megatron's layers are not used"),
    "layers_pattern": holds("layers are found by their numbers"),
    "fan_in_fan_out": holds("a kernel's axes are those of the model"),
    "qalora_group_size": holds("it belongs to use_qalora"),
    "ensure_weight_tying": unused("tied weights stay tied"),
    "runtime_config": holds("it is about PyTorch"),
    "auto_mapping": holds("the model's family is found by its config.json"),
    "inference_mode": holds("the adapter of a run trains"),
    "peft_version": holds("the file's version"),
}


def _modules(keys: Keys, key: str) -> tuple[str, ...]:
    """The patterns of modules: a list of names, or one regular expression."""
    value = keys.read(key, "any")
    if isinstance(value, str):
        return ("all-linear",) if value.lower() == "all-linear" else (_pattern(value),)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise keys.error(key, f"{key} is {value!r:.80}; it must be names or a regular expression")
    return tuple(map(_without_root, value))


def _patterns(keys: Keys, key: str) -> tuple[str, ...]:
    """Entries "pattern=value" of a table of PEFT, which may leave out the first parts of a name."""
    table = keys.read(key, "any")
    if not isinstance(table, dict):
        raise keys.error(key, f"{key} is {table!r:.80}; it must be an object")
    entries = []
    for pattern, value in table.items():
        is_name = re.fullmatch(r"[\w.]+", pattern) is not None
        own = _without_root(pattern) if is_name else rf"(.*\.)?({_pattern(pattern)})"
        entries.append(f"{own}={value}")
    return tuple(entries)


def _without_root(name: str) -> str:
    """A module's name without the model's own, which our names do not have."""
    return re.sub(r"^(base_model\.model\.)?model\.(?=.)", "", name)


def _pattern(pattern: str) -> str:
    """A regular expression of PEFT's names as one of ours: without the name of the model."""
    return re.sub(r"^\^?(base_model\\?\.model\\?\.)?model\\?\.(?=.)", "", pattern)
