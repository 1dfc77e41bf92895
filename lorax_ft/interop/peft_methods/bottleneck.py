"""Bottleneck adapters in a folder like PEFT's. PEFT has none, so only this library loads it.

Letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.peft_config import CONFIG, check_rank, shortened
from lorax_ft.interop.peft_methods.method import Matrices, Matrix, PeftMethod

A_LEAVES = {"output": "bottleneck_a_output", "input": "bottleneck_a_input"}
"""By what the adapter sees."""
NAMES = {
    "bottleneck_A.output.weight": "bottleneck_a_output",
    "bottleneck_A.input.weight": "bottleneck_a_input",
    "bottleneck_A.bias": "bottleneck_bias_a",
    "bottleneck_B.weight": "bottleneck_b",
    "bottleneck_B.bias": "bottleneck_bias_b",
}


def export_bottleneck(matrix: Matrix, base_without_start: bool) -> Matrix:
    """A, B and the biases, without padding."""
    (a,) = [name for name in A_LEAVES.values() if name in matrix]
    used = np.any(matrix[a] != 0, axis=0) | np.any(matrix["bottleneck_b"] != 0, axis=1)
    return matrix | {
        a: matrix[a][:, used],
        "bottleneck_b": matrix["bottleneck_b"][used],
        "bottleneck_bias_a": matrix["bottleneck_bias_a"][used],
    }


def bottleneck_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """A `[R, O]` or `[R, I]`, B `[O, R]`, and the biases `[R]` and `[O]`."""
    return {name: matrix[leaf].T for name, leaf in NAMES.items() if leaf in matrix}


def bottleneck_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The largest rank and the targets; each module's own rank is that of its tensors."""
    ranks = {len(matrix["bottleneck_b"]) for matrix in adapters.values()}
    return {
        "r": max(ranks),
        "target_modules": sorted(shortened(dict.fromkeys(adapters, True), modules)),
    }


def check_bottleneck_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where the rank is not a whole number above 0."""
    check_rank(config, folder)


def complete_bottleneck(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """A, B and the biases.

    Raises:
      ValueError: a tensor is missing, or their ranks differ.
    """
    found = [name for name in A_LEAVES.values() if name in matrix]
    others = [name for name in NAMES.values() if name not in A_LEAVES.values()]
    missing = [name for name in others if name not in matrix]
    if len(found) != 1 or missing:
        needed = ", ".join(NAMES)
        raise ValueError(f"{where}: a bottleneck has {needed}, with one of the first two")
    a, b = matrix[found[0]].T, matrix["bottleneck_b"].T
    ranks = {a.shape[1], len(b), len(matrix["bottleneck_bias_a"])}
    if len(ranks) > 1:
        raise ValueError(f"{where}: A, its bias and B have the ranks {sorted(ranks)}")
    if max(ranks) > config["r"]:
        raise ValueError(f"{where} has rank {max(ranks)}, and {CONFIG} says {config['r']}")
    return matrix | {
        found[0]: a,
        "bottleneck_b": b,
        "bottleneck_active": np.asarray(1, np.float32),
    }


BOTTLENECK = PeftMethod(
    peft_type="LORAX_FT_BOTTLENECK",
    marker="bottleneck_active",
    suffixes={f".{name}": leaf for name, leaf in NAMES.items()},
    export=export_bottleneck,
    tensors=bottleneck_tensors,
    config=bottleneck_config,
    check_config=check_bottleneck_config,
    complete=complete_bottleneck,
    dropout="bottleneck_dropout",
)
