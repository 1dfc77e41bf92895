"""LoHa in PEFT: `LoHaConfig` and the names of its tensors.

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
    check_values,
    rank_and_alpha_fields,
    rank_and_scale,
    shortened,
)
from lorax_ft.interop.peft_methods.method import Matrices, Matrix, PeftMethod

NAMES = {
    "hada_w1_a": "loha_b1",
    "hada_w1_b": "loha_a1",
    "hada_w2_a": "loha_b2",
    "hada_w2_b": "loha_a2",
}
"""PEFT's tensors, and the leaves, transposed, that they are."""


def export_loha(matrix: Matrix, base_without_start: bool) -> Matrix:
    """The factors without padding."""
    used = np.any([matrix["loha_a1"].any(0), matrix["loha_b1"].any(1)], axis=0)
    used[0] |= not used.any()  # PEFT has no rank 0
    exported = {"loha_scale": matrix["loha_scale"]}
    for name in ("loha_a1", "loha_a2"):
        exported[name] = matrix[name][:, used]
    for name in ("loha_b1", "loha_b2"):
        exported[name] = matrix[name][used]
    return exported


def loha_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """Two products of `[O, R]` and `[R, I]`."""
    return {name: matrix[leaf].T for name, leaf in NAMES.items()}


def loha_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The most common rank and alpha, and patterns for the modules that have others."""
    ranks = {name: len(matrix["loha_b1"]) for name, matrix in adapters.items()}
    scales = {name: matrix["loha_scale"].item() for name, matrix in adapters.items()}
    return {
        "init_weights": True,
        "target_modules": sorted(shortened(dict.fromkeys(ranks, True), modules)),
        **rank_and_alpha_fields(ranks, scales),
    }


def check_loha_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where a field that changes numbers has a value of the wrong type."""
    check_values(config, folder, alpha="alpha")


def complete_loha(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """The factors `[I, R]` and `[R, O]`, and the scale.

    Raises:
      ValueError: a tensor is missing, or its rank is not the config's.
    """
    rank, scale = rank_and_scale(config, target, alpha="alpha")
    complete = {"loha_scale": np.asarray(scale)}
    for name, leaf in NAMES.items():
        if leaf not in matrix:
            raise ValueError(f"{where} has no {name}")
        value = matrix[leaf].T
        given = value.shape[0] if leaf.startswith("loha_b") else value.shape[1]
        if given != rank:
            raise ValueError(f"{where} has rank {given} in {WEIGHTS}, and {rank} in {CONFIG}")
        complete[leaf] = value
    return complete


LOHA = PeftMethod(
    peft_type="LOHA",
    marker="loha_scale",
    suffixes={f".{name}": leaf for name, leaf in NAMES.items()},
    export=export_loha,
    tensors=loha_tensors,
    config=loha_config,
    check_config=check_loha_config,
    complete=complete_loha,
)
