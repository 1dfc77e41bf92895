"""The adapter_config.json of a PEFT folder: which modules it means, with which ranks and scales."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft import regexes

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BIN = "adapter_model.bin"  # what PEFT wrote before version 0.7
MOST_RANK = 2**20
LARGEST = 1e30
TEXTS = ("base_model_name_or_path", "bias", "peft_type", "revision", "task_type")
"""Fields that hold a text or null."""
NAMES = ("modules_to_save", "layers_pattern", "target_modules")
"""Fields that hold a text, a list of texts or null."""


def check_fields(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where a field that every type of adapter has is of the wrong type.

    Raises:
      ValueError: with the field and its value.
    """
    valid = {name: isinstance(config.get(name), str | None) for name in TEXTS}
    for name in NAMES:
        value = config.get(name)
        valid[name] = isinstance(value, str | None) or _is_name_list(value)
    _check(valid, config, folder)


def without_tensors(
    config: Mapping[str, Any],
    names: Iterable[str],
    modules: Collection[str],
) -> list[str]:
    """The targets, and the model's modules that they mean, for which there are no tensors.

    Args:
      config: of the adapter.
      names: of the modules and parameters that have tensors.
      modules: all modules of the model.
    """
    with_tensors = set(names)
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        # A regular expression does not say which modules must be there.
        targets = []
    parameters = config.get("target_parameters") or []
    excluded = config.get("exclude_modules")
    left_out = {module for module in modules if is_excluded(module, excluded)}
    unmet = []
    for target in [*targets, *parameters]:
        # With "all-linear", PEFT lists what exclude_modules leaves out among the targets.
        candidates = with_tensors | left_out
        if not any(is_target(name, [target]) for name in candidates):
            unmet.append(target)
    if config.get("layers_to_transform") is not None:  # leaves out modules that targets match
        return unmet
    for module in modules:
        if module in with_tensors or module in left_out:
            continue
        if is_target(module, targets):
            unmet.append(module)
    return unmet


def is_excluded(name: str, excluded: str | Iterable[str] | None) -> bool:
    """Whether `exclude_modules`, a regular expression or names, leave out the module."""
    if isinstance(excluded, str):
        return bool(excluded) and regexes.fullmatch(excluded, name)
    return is_target(name, excluded)


def is_target(name: str, targets: Iterable[str] | None) -> bool:
    """Whether the targets match the module, or the parameter, of this full name."""
    # A target is a full name, or its last parts.
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def is_fused(name: str) -> bool:
    """Whether PEFT fuses the module, an expert's projection or a router, with others.

    >>> is_fused("layers/0/mlp/experts/3/up_proj"), is_fused("model.layers.0.mlp.gate")
    (True, True)
    >>> is_fused("model.layers.0.mlp.gate_proj")
    False
    """
    components = re.split(r"[./]", name)
    return "experts" in components or components[-1] == "gate"


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank of a module, or of a target parameter."""
    return _matching(config.get("rank_pattern"), module, config["r"])


def rank_and_scale(
    config: Mapping[str, Any],
    module: str,
    *,
    alpha: str = "lora_alpha",
) -> tuple[int, np.float32]:
    """The rank of a module, or of a target parameter, and alpha / r or alpha / √r (rsLoRA).

    `alpha` is the name of the field with the default alpha.
    """
    rank = rank_of(config, module)
    numerator = _matching(config.get("alpha_pattern"), module, config[alpha])
    divisor: float = rank
    if config.get("use_rslora"):
        divisor = math.sqrt(rank)
    scale = numerator / divisor
    return rank, np.float32(scale)


def alpha_of(scale: float, rank: int) -> float:
    """The roundest alpha whose alpha / rank is `scale` in float32."""
    exact = float(scale) * rank
    for digits in (0, 4, 8):
        alpha = round(exact, digits)
        if np.float32(alpha / rank) != np.float32(scale):
            continue
        if alpha == int(alpha):
            # JSON then has 16, not 16.0, as PEFT writes it.
            return int(alpha)
        return alpha
    return exact


def rank_and_alpha_fields(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
) -> dict[str, Any]:
    """The most common rank and alpha, and patterns for the modules that have others.

    Args:
      ranks: by the full name of the module.
      scales: alpha / r, likewise.
    """
    alphas = {name: alpha_of(scales[name], rank) for name, rank in ranks.items()}
    rank = most_common(ranks)
    alpha = most_common(alphas)
    other_ranks = {name: value for name, value in ranks.items() if value != rank}
    other_alphas = {name: value for name, value in alphas.items() if value != alpha}
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": shortened(other_ranks, ranks),
        "alpha_pattern": shortened(other_alphas, ranks),
    }


def most_common(values: Mapping[str, Any]) -> Any:
    """The value that most of the modules have."""
    [(value, _)] = collections.Counter(values.values()).most_common(1)
    return value


def shortened(values: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """`values` by last name where all modules of that last name have the same, else by full name.

    >>> shortened({"h.0.q": 1, "h.1.q": 1, "h.0.k": 1}, ["h.0.q", "h.1.q", "h.0.k", "h.1.k"])
    {'q': 1, 'h.0.k': 1}
    """
    groups: dict[str, list[str]] = {}
    for name in modules:
        _, _, last = name.rpartition(".")
        groups.setdefault(last, []).append(name)
    short: dict[str, Any] = {}
    for last, names in groups.items():
        held = {name: values[name] for name in names if name in values}
        has_all = len(held) == len(names)
        distinct = set(held.values())
        if has_all and len(distinct) == 1:
            short[last] = held[names[0]]
        else:
            short |= held
    return short


def check_values(
    config: Mapping[str, Any],
    folder: Path,
    *,
    alpha: str = "lora_alpha",
) -> None:
    """Raise where a field of a config that changes numbers has a value of the wrong type."""
    check_rank(config, folder)
    valid = {alpha: _is_positive(config.get(alpha))}
    for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
        flag = config.get(name, False)
        valid[name] = isinstance(flag, bool)
    check_patterns(config, folder)
    parameters = config.get("target_parameters") or []
    valid["target_parameters"] = _is_name_list(parameters)
    excluded = config.get("exclude_modules") or []
    valid["exclude_modules"] = _is_pattern(excluded) or _is_name_list(excluded)
    _check(valid, config, folder)


def _check(valid: Mapping[str, bool], config: Mapping[str, Any], folder: Path) -> None:
    """Raise for the first field that is not valid."""
    for name, is_valid in valid.items():
        if not is_valid:
            value = repr(config.get(name))[:80]
            raise ValueError(f"{folder / CONFIG}: {name} is {value}, which is not a valid value")


def check_patterns(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where a table of ranks or alphas by pattern is not one."""
    valid = {}
    for name in ("rank_pattern", "alpha_pattern"):
        # null means no patterns.
        valid[name] = _is_pattern_table(config.get(name) or {})
    _check(valid, config, folder)


def check_rank(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where the config's one rank is not a whole number above 0."""
    rank = config.get("r")
    is_rank = isinstance(rank, int) and _is_positive(rank) and rank <= MOST_RANK
    _check({"r": is_rank}, config, folder)


def one_rank(ranks: Collection[int], method: str) -> int:
    """The rank of all adapters of a type for which PEFT has no `rank_pattern`."""
    if len(ranks) > 1:
        found = ", ".join(map(str, sorted(ranks)))
        raise ValueError(f"PEFT's {method} has one rank, and the adapters have {found}")
    [rank] = ranks
    return rank


def _is_positive(value: Any) -> bool:
    """Whether a value is a number above 0; bools are ints in Python."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # float32 holds no larger ones, and Python converts no larger integers.
    return is_number and 0 < value < LARGEST


def _is_name_list(names: Any) -> bool:
    """Whether a value is a list of strings."""
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _is_pattern(pattern: Any) -> bool:
    """Whether a value is a regular expression."""
    if not isinstance(pattern, str):
        return False
    try:
        regexes.compiled(pattern)
    except ValueError:
        return False
    return True


def _is_pattern_table(patterns: Any) -> bool:
    """Whether a value is a dict of regular expressions and positive numbers."""
    if not isinstance(patterns, dict):
        return False
    for pattern, value in patterns.items():
        if not _is_pattern(pattern) or not _is_positive(value):
            return False
    return True


def _matching(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module, as PEFT matches them."""
    if not patterns:
        return default
    for pattern, value in patterns.items():
        # The pattern may leave out the first parts of the name, but not a part of one.
        if regexes.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
