"""SHiRA in PEFT: `ShiraConfig` and the names of its tensors.

Letters: I inputs, O outputs, N elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.lazy_tensor import FLOATS_AND_INDICES
from lorax_ft.interop.peft_config import check_rank, one_rank, shortened
from lorax_ft.interop.peft_methods.method import Matrices, Matrix, PeftMethod


def export_shira(matrix: Matrix, base_without_start: bool) -> Matrix:
    """The elements and their places."""
    return matrix


def shira_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """The elements `[N]`, and their places in a matrix `[O, I]`, `[2, N]`."""
    places = np.stack([matrix["shira_column"], matrix["shira_row"]])
    return {"shira_weight": matrix["shira_value"], "shira_indices": places.astype(np.int32)}


def shira_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The rank, of which the number of elements is a multiple, and the targets."""
    names = list(modules)
    ranks = {int(matrix["shira_rank"]) for matrix in adapters.values()}
    return {
        "fan_in_fan_out": False,
        "init_weights": True,
        "mask_type": "random",
        "r": one_rank(ranks, "SHiRA"),
        "target_modules": sorted(shortened(dict.fromkeys(adapters, True), names)),
    }


def check_shira_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where the rank is not a whole number above 0."""
    check_rank(config, folder)


def complete_shira(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """The elements, their rows and columns, and the rank.

    Raises:
      ValueError: a tensor is missing, or the two do not fit each other.
    """
    for name in ("shira_value", "shira_indices"):
        if name not in matrix:
            raise ValueError(f"{where} has no {name}")
    value = matrix["shira_value"]
    # PEFT writes floats on Windows.
    given = matrix["shira_indices"]
    places = given.astype(np.int32)
    if np.any(places != given):
        raise ValueError(f"{where}: shira_indices are no whole numbers")
    if places.shape != (2, *value.shape):
        raise ValueError(
            f"{where} has {value.size} elements, and places of the shape {places.shape}"
        )
    column, row = places
    return {
        "shira_value": value,
        "shira_row": row,
        "shira_column": column,
        "shira_rank": np.asarray(config["r"], np.float32),
    }


def check_shira_fits(matrix: Matrix, inputs: int, outputs: int, where: str) -> None:
    """Raise where an element lies outside the module's weight, or the rank has another number."""
    rank, given = int(matrix["shira_rank"]), matrix["shira_value"].size
    if given != rank * (inputs + outputs):
        raise ValueError(
            f"{where} has {given} elements; rank {rank} of a module with {inputs} inputs and "
            f"{outputs} outputs has {rank * (inputs + outputs)}"
        )
    for name, size in (("shira_row", inputs), ("shira_column", outputs)):
        places = matrix[name]
        if places.size and not 0 <= places.min() <= places.max() < size:
            raise ValueError(
                f"{where}: shira_indices are from {places.min()} to {places.max()}, and the "
                f"model's module has {size}"
            )


SHIRA = PeftMethod(
    peft_type="SHIRA",
    marker="shira_rank",
    suffixes={".shira_weight": "shira_value", ".shira_indices": "shira_indices"},
    export=export_shira,
    tensors=shira_tensors,
    config=shira_config,
    check_config=check_shira_config,
    complete=complete_shira,
    check_fits=check_shira_fits,
    dtypes=FLOATS_AND_INDICES,
)
