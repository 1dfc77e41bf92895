"""LoKr in PEFT: `LoKrConfig` and the names of its tensors.

Letters: R rank.
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
from lorax_ft.lowrank.terms.lokr import split

NAMES = {
    "lokr_w1": "lokr_left",
    "lokr_w2": "lokr_right",
    "lokr_w2_b": "lokr_right_a",
    "lokr_w2_a": "lokr_right_b",
}
"""PEFT's tensors, and the leaves, transposed, that they are."""
LEFT_FACTORS = ("lokr_w1_a", "lokr_w1_b")
"""What PEFT has in place of lokr_w1 with `decompose_both`."""


def export_lokr(matrix: Matrix, base_without_start: bool) -> Matrix:
    """The matrices."""
    return matrix


def lokr_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """K₁ᵀ, and K₂ᵀ or its two factors."""
    return {name: matrix[leaf].T for name, leaf in NAMES.items() if leaf in matrix}


def lokr_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The most common rank and alpha, and patterns for the modules that have others.

    Raises:
      ValueError: no `decompose_factor` gives PEFT's modules these sizes.
    """
    ranks = {name: _rank(matrix) for name, matrix in adapters.items()}
    scales = {name: matrix["lokr_scale"].item() for name, matrix in adapters.items()}
    return {
        "decompose_both": False,
        "decompose_factor": _factor(adapters),
        "init_weights": True,
        "target_modules": sorted(shortened(dict.fromkeys(ranks, True), modules)),
        **rank_and_alpha_fields(ranks, scales),
    }


def check_lokr_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where a field that changes numbers has a value of the wrong type."""
    check_values(config, folder, alpha="alpha")


def complete_lokr(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """K₁, K₂ or its two factors, and the scale. A K₁ of two factors becomes their product.

    Raises:
      ValueError: a tensor is missing, or its rank is not the config's.
    """
    rank, scale = rank_and_scale(config, target, alpha="alpha")
    complete = {"lokr_scale": np.asarray(scale)}
    if all(name in matrix for name in LEFT_FACTORS):
        first, second = (matrix[name] for name in LEFT_FACTORS)
        matrix = matrix | {"lokr_left": first @ second}
    has_whole = "lokr_right" in matrix
    needed = ["lokr_w1", *(["lokr_w2"] if has_whole else ["lokr_w2_a", "lokr_w2_b"])]
    for name in needed:
        leaf = NAMES[name]
        if leaf not in matrix:
            raise ValueError(f"{where} has no {name}")
        complete[leaf] = matrix[leaf].T
    if not has_whole and len(complete["lokr_right_b"]) != rank:
        given = len(complete["lokr_right_b"])
        raise ValueError(f"{where} has rank {given} in {WEIGHTS}, and {rank} in {CONFIG}")
    return complete


def check_lokr_fits(matrix: Matrix, inputs: int, outputs: int, where: str) -> None:
    """Raise where the Kronecker product has another shape than the module's weight."""
    (left_in, right_in), (left_out, right_out) = _sides(matrix)
    given = (left_in * right_in, left_out * right_out)
    if given != (inputs, outputs):
        raise ValueError(
            f"{where}: its Kronecker product has {given[0]} inputs and {given[1]} outputs; the "
            f"model's module has {inputs} and {outputs}"
        )


LOKR = PeftMethod(
    peft_type="LOKR",
    marker="lokr_scale",
    suffixes={
        **{f".{name}": leaf for name, leaf in NAMES.items()},
        **{f".{name}": name for name in LEFT_FACTORS},
    },
    export=export_lokr,
    tensors=lokr_tensors,
    config=lokr_config,
    check_config=check_lokr_config,
    complete=complete_lokr,
    check_fits=check_lokr_fits,
)


def _rank(matrix: Matrix) -> int:
    """The rank, or one with which PEFT has K₂ whole."""
    if "lokr_right_b" in matrix:
        return len(matrix["lokr_right_b"])
    return max(matrix["lokr_right"].shape)


def _sides(matrix: Matrix) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two factors of the inputs, and those of the outputs."""
    left_in, left_out = matrix["lokr_left"].shape
    if "lokr_right" in matrix:
        right_in, right_out = matrix["lokr_right"].shape
    else:
        right_in = len(matrix["lokr_right_a"])
        right_out = matrix["lokr_right_b"].shape[1]
    return (left_in, right_in), (left_out, right_out)


def _factor(adapters: Matrices) -> int:
    """The `decompose_factor` with which PEFT's modules have these sizes; −1 is its default."""
    sizes = set()
    for matrix in adapters.values():
        sizes |= set(_sides(matrix))
    largest = max(first for first, _ in sizes)
    for factor in (None, *range(1, largest + 1)):
        if all(split(first * second, factor) == (first, second) for first, second in sizes):
            return -1 if factor is None else factor
    raise ValueError(
        "PEFT's LoKr has one decompose_factor, and the adapters have matrices of "
        f"different splits: {sorted(sizes)}"
    )
