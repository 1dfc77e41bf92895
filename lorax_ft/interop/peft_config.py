"""The adapter_config.json of a PEFT folder: what it says of each module's rank and scale."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.huggingface import read_json

CONFIG = "adapter_config.json"
SAFE_INITS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
)  # those that leave the base as it is
UNSUPPORTED = (
    *(
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "monteclora_config",
    ),
    *("trainable_token_indices", "use_bdlora", "use_qalora"),
)


def write_config(
    ranks: Mapping[str, int], scales: Mapping[str, float], *, modules: Iterable[str], **fields: Any
) -> dict[str, Any]:
    """The adapter_config.json of a LoRA.

    Args:
      ranks: by the full name of each adapted module.
      scales: by the same names; float32 values, which alpha / rank gives back exactly.
      modules: full names of all modules of the model.
      **fields: further fields, written as they are.

    >>> write_config({"h.0.q": 8, "h.1.q": 4}, {"h.0.q": 2.0, "h.1.q": 2.0}, modules=["h.0.q", "h.1.q", "h.1.k"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'inference_mode': True, 'bias': 'none', 'fan_in_fan_out': False,
     'init_lora_weights': True, 'use_rslora': False, 'r': 8, 'lora_alpha': 16, 'target_modules': ['q'],
     'rank_pattern': {'h.1.q': 4}, 'alpha_pattern': {'h.1.q': 8}}
    """
    alphas = {name: _alpha(scales[name], rank) for name, rank in ranks.items()}
    r, alpha = (
        collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas)
    )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(_shortened(dict.fromkeys(ranks, True), modules)),
        "rank_pattern": _shortened(
            {name: rank for name, rank in ranks.items() if rank != r}, ranks
        ),
        "alpha_pattern": _shortened(
            {name: value for name, value in alphas.items() if value != alpha}, ranks
        ),
        **fields,
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
      ValueError: it is missing, is no LoRA's, or has an option that changes numbers and is not supported.
    """
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder} holds an adapter of type {config.get('peft_type')!r}; supported: 'LORA'"
        )
    _check_values(config, folder)
    if config.get("init_lora_weights") not in SAFE_INITS:
        raise ValueError(
            f"{folder} starts from init_lora_weights {config['init_lora_weights']!r}, which changed its base; "
            "save it in PEFT with path_initial_model_for_weight_conversion"
        )
    if given := [name for name in UNSUPPORTED if config.get(name)]:
        raise ValueError(f"{folder} uses {given[0]} in its {CONFIG}, which is not supported")
    return config


def without_tensors(
    config: Mapping[str, Any], names: Iterable[str], modules: Iterable[str]
) -> list[str]:
    """The targets, and those of the model's modules that they mean, of which there are no tensors.

    Args:
      config: of the adapter.
      names: of the modules and parameters of which there are.
      modules: all of the model's.
    """
    names = set(names)
    given = config.get("target_modules")
    targets = given if isinstance(given, list) else []
    chosen = [
        name for name in ("exclude_modules", "layers_to_transform") if config.get(name) is not None
    ]
    meant = [] if chosen else [module for module in modules if is_target(module, targets)]
    unmet = [
        t
        for t in [*targets, *(config.get("target_parameters") or [])]
        if not any(is_target(n, [t]) for n in names)
    ]
    return [*unmet, *(module for module in meant if module not in names)]


def is_target(name: str, targets: Iterable[str] | None) -> bool:
    """Whether the targets match the module, or the parameter, of this full name."""
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def _check_values(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where a field that changes numbers has another type than it should."""

    def number(value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and value > 0
        )

    good = {name: number(config.get(name)) for name in ("r", "lora_alpha")}
    good["r"] = good["r"] and isinstance(config["r"], int)
    for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
        good[name] = isinstance(config.get(name, False), bool)
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        good[name] = (
            isinstance(patterns, dict)
            and all(map(number, patterns.values()))
            and all(map(_regular, patterns))
        )
    parameters = config.get("target_parameters") or []
    good["target_parameters"] = isinstance(parameters, list) and all(
        isinstance(name, str) for name in parameters
    )
    if bad := [name for name, fine in good.items() if not fine]:
        raise ValueError(
            f"{folder / CONFIG}: {bad[0]} is {config.get(bad[0])!r}, which is no value for it"
        )


def _regular(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, np.float32]:
    """The rank of a module, or of a target parameter, and alpha / r or alpha / √r (rsLoRA)."""
    rank = _matching(config.get("rank_pattern"), module, config["r"])
    alpha = _matching(config.get("alpha_pattern"), module, config["lora_alpha"])
    return rank, np.float32(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _matching(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    matching = (
        value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)
    )
    return next(matching, default)


def _alpha(scale: float, rank: int) -> float:
    """The roundest alpha whose alpha / rank is `scale` in float32."""
    for digits in (0, 4, 8):
        alpha = round(float(scale) * rank, digits)
        if np.float32(alpha / rank) == np.float32(scale):
            return int(alpha) if alpha == int(alpha) else alpha
    return float(scale) * rank


def _shortened(values: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """`values` by last name where all modules of that last name have the same value, else by full name.

    >>> _shortened({"h.0.q": 1, "h.1.q": 1, "h.0.k": 1}, ["h.0.q", "h.1.q", "h.0.k", "h.1.k"])
    {'q': 1, 'h.0.k': 1}
    """
    groups: dict[str, list[str]] = {}
    for name in modules:
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    short: dict[str, Any] = {}
    for last, names in groups.items():
        held = {name: values[name] for name in names if name in values}
        uniform = len(held) == len(names) and len(set(held.values())) == 1
        short |= {last: held[names[0]]} if uniform else held
    return short
