"""PEFT's adapter types: what each writes into adapter_config.json and calls its tensors.

A type is one row of `METHODS`. Its functions convert between the leaves of one adapted matrix,
without stack axes and padding (`Matrix`), and PEFT's tensors.

Letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax_ft.interop.peft_config import (
    CONFIG,
    WEIGHTS,
    alpha_of,
    check_values,
    is_fused,
    rank_and_scale,
    shortened,
)

Matrix = dict[str, np.ndarray]
"""The leaves of one adapted matrix, by name."""
Matrices = Mapping[str, Matrix]
"""The same by the full name of the module in the checkpoint."""

SAFE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that keep the base
UNSUPPORTED_LORA = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)


class PeftMethod(NamedTuple):
    """One of PEFT's adapter types."""

    peft_type: str
    marker: str
    """A leaf that every adapter of this type has, and no other."""
    suffixes: Mapping[str, str]
    """What a tensor's name ends with, and the leaf that it is."""
    export: Callable[[Matrix, bool], Matrix]
    """(leaves, whether the base in the folder is without the start) -> leaves without padding."""
    tensors: Callable[[Matrix, bool], Mapping[str, np.ndarray]]
    """(leaves, whether the module is an embedding) -> tensors by the end of their names."""
    config: Callable[[Matrices, Iterable[str]], dict[str, Any]]
    """(all adapters, full names of all modules) -> fields of adapter_config.json."""
    check_config: Callable[[Mapping[str, Any], Path], None]
    """Raises where the config has an option that changes numbers and is not supported."""
    complete: Callable[[Matrix, Mapping[str, Any], str, str], Matrix]
    """(tensors as read, config, PEFT's name of the target, place for errors) -> all leaves."""
    dropout: str | None = None
    """The field of the config that holds the dropout rate."""


def export_lora(matrix: Matrix, base_without_start: bool) -> Matrix:
    """A and B without padding.

    The start becomes further columns, A' = [A, A₀] and B' = [B; −B₀], unless the base that goes
    with the adapter is already without it.
    """
    parts = [(matrix["lora_a"], matrix["lora_b"])]
    is_kept = "start_scale" in matrix
    if "lora_a0" in matrix and (is_kept or not base_without_start):
        parts.append((matrix["lora_a0"], -matrix["lora_b0"]))
    used = np.any([a.any(0) | b.any(1) for a, b in parts], axis=0)
    used[0] |= not used.any()  # PEFT has no rank 0
    used_a = [a[:, used] for a, _ in parts]
    used_b = [b[used] for _, b in parts]
    exported = {
        "lora_scale": matrix["lora_scale"],
        "lora_a": np.concatenate(used_a, axis=1),
        "lora_b": np.concatenate(used_b),
    }
    if "magnitude" in matrix:
        exported["magnitude"] = matrix["magnitude"]
    return exported


def lora_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """A `[R, I]` and B `[O, R]`, as PEFT has them."""
    a_name = "lora_A.weight"
    b_name = "lora_B.weight"
    if is_embedding:
        a_name = "lora_embedding_A"
        b_name = "lora_embedding_B"
    tensors = {
        a_name: matrix["lora_a"].T,
        b_name: matrix["lora_b"].T,
    }
    if "magnitude" in matrix:
        tensors["lora_magnitude_vector"] = matrix["magnitude"]
    return tensors


def lora_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The most common rank and alpha, and patterns for the modules that have others.

    >>> a, b, scale = np.ones((3, 8)), np.ones((8, 5)), np.float32(2)
    >>> full = {"lora_a": a, "lora_b": b, "lora_scale": scale}
    >>> half = {"lora_a": a[:, :4], "lora_b": b[:4], "lora_scale": scale}
    >>> config = lora_config({"h.0.q": full, "h.1.q": half}, ["h.0.q", "h.1.q", "h.1.k"])
    >>> {key: config[key] for key in ("r", "lora_alpha", "target_modules", "rank_pattern")}
    {'r': 8, 'lora_alpha': 16, 'target_modules': ['q'], 'rank_pattern': {'h.1.q': 4}}
    """
    if len({"magnitude" in matrix for matrix in adapters.values()}) > 1:
        raise ValueError(
            "save_peft: some adapters have a DoRA magnitude and some have none; PEFT needs all or "
            "none"
        )
    ranks = {}
    alphas = {}
    for name, matrix in adapters.items():
        _, ranks[name] = matrix["lora_a"].shape
        scale = matrix["lora_scale"].item()
        alphas[name] = alpha_of(scale, ranks[name])
    # PEFT matches no pattern with experts that it fuses: they need the default.
    fused = [name for name in adapters if is_fused(name)]
    rank = _most_common({name: ranks[name] for name in fused or ranks})
    alpha = _most_common({name: alphas[name] for name in fused or alphas})
    other_ranks = {name: value for name, value in ranks.items() if value != rank}
    other_alphas = {name: value for name, value in alphas.items() if value != alpha}
    return {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": any("magnitude" in matrix for matrix in adapters.values()),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(shortened(dict.fromkeys(ranks, True), modules)),
        "rank_pattern": shortened(other_ranks, ranks),
        "alpha_pattern": shortened(other_alphas, ranks),
    }


def check_lora_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where a LoRA config changes its base, or uses an option that is not supported."""
    check_values(config, folder)
    init = config.get("init_lora_weights")
    if init not in SAFE_INITS:
        raise ValueError(
            f"{folder} starts from init_lora_weights {init!r}, which changed its base; "
            "save it in PEFT with path_initial_model_for_weight_conversion"
        )
    for name in UNSUPPORTED_LORA:
        if config.get(name):
            raise ValueError(f"{folder} uses {name} in its {CONFIG}, which is not supported")


def complete_lora(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """A `[I, R]`, B `[R, O]`, the scale and the magnitude `[O]`.

    Raises:
      ValueError: a tensor is missing, or its rank is not the config's.
    """
    needed = ["lora_a", "lora_b"]
    if config.get("use_dora"):
        needed.append("magnitude")
    for name in needed:
        if name not in matrix:
            raise ValueError(f"{where} has no {name}")
    a = matrix["lora_a"].T
    b = matrix["lora_b"].T
    rank, scale = rank_and_scale(config, target)
    if a.shape[1:] != (rank,) or b.shape[:1] != (rank,):
        raise ValueError(f"{where} has rank {a.shape[-1]} in {WEIGHTS}, and {rank} in {CONFIG}")
    complete = {"lora_a": a, "lora_b": b, "lora_scale": np.asarray(scale)}
    if "magnitude" in matrix:
        complete["magnitude"] = matrix["magnitude"].reshape(-1)
    return complete


LORA = PeftMethod(
    peft_type="LORA",
    marker="lora_scale",
    suffixes={
        ".lora_A.weight": "lora_a",
        ".lora_B.weight": "lora_b",
        ".lora_embedding_A": "lora_a",
        ".lora_embedding_B": "lora_b",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",  # as some versions of PEFT wrote it
    },
    export=export_lora,
    tensors=lora_tensors,
    config=lora_config,
    check_config=check_lora_config,
    complete=complete_lora,
    dropout="lora_dropout",
)


def export_ia3(matrix: Matrix, base_without_start: bool) -> Matrix:
    """The vector."""
    return matrix


def ia3_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """The vector of an input as `[1, I]`, of an output as `[O, 1]`.

    Raises:
      ValueError: PEFT's IA3 has no embeddings.
    """
    if is_embedding:
        raise ValueError("save_peft: PEFT has no IA3 for embeddings; exclude them")
    if "ia3_in" in matrix:
        return {"ia3_l": matrix["ia3_in"][None]}
    return {"ia3_l": matrix["ia3_out"][:, None]}


def ia3_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The targets, and which of them scale their input."""
    names = list(modules)
    feedforward = {name: True for name, matrix in adapters.items() if "ia3_in" in matrix}
    return {
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "target_modules": sorted(shortened(dict.fromkeys(adapters, True), names)),
        "feedforward_modules": sorted(shortened(feedforward, names)),
    }


def check_ia3_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where the modules that scale their input are not names or a regular expression."""
    patterns = config.get("feedforward_modules")
    is_list = isinstance(patterns, list) and all(isinstance(name, str) for name in patterns)
    if not is_list and not isinstance(patterns, str | None):
        raise ValueError(
            f"{folder / CONFIG}: feedforward_modules is {patterns!r}, which is not a valid value"
        )
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except re.error as error:
            raise ValueError(
                f"{folder / CONFIG}: feedforward_modules {patterns!r} is not a regular expression: "
                f"{error}"
            ) from error


def complete_ia3(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """The vector `[I]` or `[O]`.

    Raises:
      ValueError: its shape is not that of an input's or an output's vector.
    """
    value = matrix["ia3_l"]
    scales_input = matches_any(config.get("feedforward_modules"), target)
    long_axis = 1 if scales_input else 0
    if value.size != value.shape[long_axis]:
        expected = "[1, in]" if scales_input else "[out, 1]"
        raise ValueError(f"{where}: ia3_l has the shape {value.shape}; it must be {expected}")
    name = "ia3_in" if scales_input else "ia3_out"
    return {name: value.reshape(-1), "ia3_active": np.asarray(1, np.float32)}


IA3 = PeftMethod(
    peft_type="IA3",
    marker="ia3_active",
    suffixes={".ia3_l": "ia3_l"},
    export=export_ia3,
    tensors=ia3_tensors,
    config=ia3_config,
    check_config=check_ia3_config,
    complete=complete_ia3,
)


def export_miss(matrix: Matrix, base_without_start: bool) -> Matrix:
    """D without padding."""
    return matrix | {"miss_block": matrix["miss_block"][: int(matrix["miss_rank"])]}


def miss_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """D `[R, O]`.

    Raises:
      ValueError: PEFT's MiSS has no embeddings.
    """
    if is_embedding:
        raise ValueError("save_peft: PEFT has no MiSS for embeddings; exclude them")
    return {"miss_block": matrix["miss_block"]}


def miss_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The rank and the targets.

    Raises:
      ValueError: there are several ranks.
    """
    ranks = {int(matrix["miss_rank"]) for matrix in adapters.values()}
    if len(ranks) > 1:
        raise ValueError(f"save_peft: PEFT's MiSS has one rank, and the adapters have {ranks}")
    return {
        "bias": "none",
        "init_weights": True,
        "r": ranks.pop(),
        "target_modules": sorted(shortened(dict.fromkeys(adapters, True), modules)),
    }


def check_miss_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise for MiSS's variants, whose blocks mean something else, and for a rank that is none."""
    if not isinstance(config.get("init_weights", True), bool):
        raise ValueError(
            f"{folder} uses init_weights {config['init_weights']!r} in its {CONFIG}, which is not "
            "supported"
        )
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{folder / CONFIG}: r is {rank!r}, which is not a valid value")


def complete_miss(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """D and its rank.

    Raises:
      ValueError: the rank is not the config's.
    """
    rank, given = config["r"], len(matrix["miss_block"])
    if given != rank:
        raise ValueError(f"{where} has rank {given} in {WEIGHTS}, and {rank} in {CONFIG}")
    return matrix | {"miss_rank": np.asarray(rank, np.float32)}


MISS = PeftMethod(
    peft_type="MISS",
    marker="miss_rank",
    suffixes={".miss_block": "miss_block"},
    export=export_miss,
    tensors=miss_tensors,
    config=miss_config,
    check_config=check_miss_config,
    complete=complete_miss,
    dropout="miss_dropout",
)

METHODS: Mapping[str, PeftMethod] = {"lora": LORA, "ia3": IA3, "miss": MISS}
"""By `AdapterConfig.method`."""


def method_name(config: Mapping[str, Any], folder: Path) -> str:
    """The `AdapterConfig.method` of the type that an adapter_config.json names.

    Raises:
      ValueError: the type is not supported.
    """
    peft_type = config.get("peft_type")
    for name, method in METHODS.items():
        if method.peft_type == peft_type:
            return name
    known = ", ".join(repr(method.peft_type) for method in METHODS.values())
    raise ValueError(f"{folder} holds an adapter of type {peft_type!r}; supported: {known}")


def method_of_config(config: Mapping[str, Any], folder: Path) -> PeftMethod:
    """The row of the type that an adapter_config.json names, or an error as `method_name`'s."""
    return METHODS[method_name(config, folder)]


def method_of_matrix(matrix: Matrix) -> PeftMethod:
    """The row of the type whose leaves an adapted matrix has."""
    for method in METHODS.values():
        if method.marker in matrix:
            return method
    raise ValueError(f"save_peft: PEFT has no adapter with the leaves {', '.join(matrix)}")


def _most_common(values: Mapping[str, Any]) -> Any:
    [(value, _)] = collections.Counter(values.values()).most_common(1)
    return value


def matches_any(patterns: Any, module: str) -> bool:
    """Whether PEFT's patterns, a list of names and suffixes or a regular expression, match."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module.endswith(pattern) for pattern in patterns or ())
