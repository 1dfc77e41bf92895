"""LoRA and its kin in PEFT: `LoraConfig` and the names of its tensors.

Letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.peft_config import (
    CONFIG,
    WEIGHTS,
    alpha_of,
    check_values,
    is_fused,
    most_common,
    rank_and_scale,
    shortened,
)
from lorax_ft.interop.peft_methods.method import Matrices, Matrix, PeftMethod

SAFE_INITS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # those that keep the base
UNSUPPORTED_LORA = (
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)


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
            "some adapters have a DoRA magnitude and some have none; PEFT needs all or none"
        )
    ranks = {}
    alphas = {}
    for name, matrix in adapters.items():
        _, ranks[name] = matrix["lora_a"].shape
        scale = matrix["lora_scale"].item()
        alphas[name] = alpha_of(scale, ranks[name])
    # PEFT matches no pattern with experts that it fuses: they need the default.
    fused = [name for name in adapters if is_fused(name)]
    rank = most_common({name: ranks[name] for name in fused or ranks})
    alpha = most_common({name: alphas[name] for name in fused or alphas})
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


def invocation_of(config: Mapping[str, Any], folder: Path, *, vocab_size: int) -> list[int]:
    """The token ids at which an activated LoRA starts to act.

    Raises:
      ValueError: they are no ids of a vocabulary of this size.
    """
    tokens: list[int] = config["alora_invocation_tokens"]
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < vocab_size for token in tokens
    ):
        raise ValueError(
            f"{folder / CONFIG}: alora_invocation_tokens is {str(tokens)[:80]}; it must be a list "
            f"of ids of the model's {vocab_size} tokens"
        )
    return tokens


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
