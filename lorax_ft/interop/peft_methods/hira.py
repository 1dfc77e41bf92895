"""HiRA in PEFT: `HiraConfig` and the names of its tensors.

Letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.peft_config import check_rank, one_rank, shortened
from lorax_ft.interop.peft_methods.method import Matrices, Matrix, PeftMethod

NAMES = {"hira_A": "hira_a", "hira_B": "hira_b"}
"""PEFT's tensors, and the leaves, transposed, that they are."""


def export_hira(matrix: Matrix, base_without_start: bool) -> Matrix:
    """A and B."""
    return matrix


def fit_hira(adapters: Mapping[str, Matrix]) -> Mapping[str, Matrix]:
    """All with the largest rank, the others padded with zeros: PEFT 0.21 ignores `rank_pattern`."""
    largest = max(len(matrix["hira_b"]) for matrix in adapters.values())
    fitted = {}
    for path, matrix in adapters.items():
        missing = largest - len(matrix["hira_b"])
        fitted[path] = matrix | {
            "hira_a": np.pad(matrix["hira_a"], ((0, 0), (0, missing))),
            "hira_b": np.pad(matrix["hira_b"], ((0, missing), (0, 0))),
        }
    return fitted


def hira_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """A `[R, I]` and B `[O, R]`."""
    return {name: matrix[leaf].T for name, leaf in NAMES.items()}


def hira_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The rank and the targets."""
    ranks = {len(matrix["hira_b"]) for matrix in adapters.values()}
    return {
        "fan_in_fan_out": False,
        "init_weights": True,
        "r": one_rank(ranks, "HiRA"),
        "target_modules": sorted(shortened(dict.fromkeys(adapters, True), modules)),
    }


def check_hira_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where the rank is not a whole number above 0."""
    check_rank(config, folder)


def complete_hira(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """A `[I, R]` and B `[R, O]`.

    Raises:
      ValueError: a tensor is missing, or the two have different ranks.
    """
    for name, leaf in NAMES.items():
        if leaf not in matrix:
            raise ValueError(f"{where} has no {name}")
    a = matrix["hira_a"].T
    b = matrix["hira_b"].T
    # The config's rank pattern says nothing: PEFT 0.21 ignores it.
    if a.shape[1] != len(b):
        raise ValueError(f"{where} has hira_A of rank {a.shape[1]} and hira_B of rank {len(b)}")
    return {"hira_a": a, "hira_b": b, "hira_active": np.asarray(1, np.float32)}


HIRA = PeftMethod(
    peft_type="HIRA",
    marker="hira_active",
    suffixes={f".{name}": leaf for name, leaf in NAMES.items()},
    export=export_hira,
    fit=fit_hira,
    tensors=hira_tensors,
    config=hira_config,
    check_config=check_hira_config,
    complete=complete_hira,
    dropout="hira_dropout",
)
