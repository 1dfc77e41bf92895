"""HiRA in PEFT: `HiraConfig` and the names of its tensors.

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
    check_patterns,
    check_rank,
    most_common,
    rank_of,
    shortened,
)
from lorax_ft.interop.peft_methods.method import Matrices, Matrix, PeftMethod

NAMES = {"hira_A": "hira_a", "hira_B": "hira_b"}
"""PEFT's tensors, and the leaves, transposed, that they are."""


def export_hira(matrix: Matrix, base_without_start: bool) -> Matrix:
    """A and B without padding."""
    used = np.any([matrix["hira_a"].any(0), matrix["hira_b"].any(1)], axis=0)
    used[0] |= not used.any()  # PEFT has no rank 0
    return {
        "hira_a": matrix["hira_a"][:, used],
        "hira_b": matrix["hira_b"][used],
        "hira_active": matrix["hira_active"],
    }


def hira_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """A `[R, I]` and B `[O, R]`."""
    return {name: matrix[leaf].T for name, leaf in NAMES.items()}


def hira_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The most common rank, and a pattern for the modules that have others."""
    ranks = {name: len(matrix["hira_b"]) for name, matrix in adapters.items()}
    rank = most_common(ranks)
    others = {name: value for name, value in ranks.items() if value != rank}
    return {
        "fan_in_fan_out": False,
        "init_weights": True,
        "r": rank,
        "rank_pattern": shortened(others, ranks),
        "target_modules": sorted(shortened(dict.fromkeys(ranks, True), modules)),
    }


def check_hira_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where a field that changes numbers has a value of the wrong type."""
    check_rank(config, folder)
    check_patterns(config, folder)


def complete_hira(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """A `[I, R]` and B `[R, O]`.

    Raises:
      ValueError: a tensor is missing, or its rank is not the config's.
    """
    for name, leaf in NAMES.items():
        if leaf not in matrix:
            raise ValueError(f"{where} has no {name}")
    rank = rank_of(config, target)
    a = matrix["hira_a"].T
    b = matrix["hira_b"].T
    if a.shape[1:] != (rank,) or b.shape[:1] != (rank,):
        raise ValueError(f"{where} has rank {a.shape[-1]} in {WEIGHTS}, and {rank} in {CONFIG}")
    return {"hira_a": a, "hira_b": b, "hira_active": np.asarray(1, np.float32)}


HIRA = PeftMethod(
    peft_type="HIRA",
    marker="hira_active",
    suffixes={f".{name}": leaf for name, leaf in NAMES.items()},
    export=export_hira,
    tensors=hira_tensors,
    config=hira_config,
    check_config=check_hira_config,
    complete=complete_hira,
    dropout="hira_dropout",
)
