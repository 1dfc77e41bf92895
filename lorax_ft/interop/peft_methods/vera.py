"""VeRA in PEFT: `VeraConfig` and the names of its tensors.

Letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.peft_config import CONFIG, WEIGHTS, check_rank, one_rank, shortened
from lorax_ft.interop.peft_methods.method import Matrices, Matrix, PeftMethod


def export_vera(matrix: Matrix, base_without_start: bool) -> Matrix:
    """The two vectors."""
    return matrix


def vera_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """d `[R]` and b `[O]`."""
    return {name: matrix[name] for name in ("vera_lambda_d", "vera_lambda_b")}


def vera_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The rank and the targets; A and B lie in the folder, so that no random seed is needed."""
    ranks = {len(matrix["vera_lambda_d"]) for matrix in adapters.values()}
    return {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "save_projection": True,
        "r": one_rank(ranks, "VeRA"),
        "target_modules": sorted(shortened(dict.fromkeys(adapters, True), modules)),
    }


def check_vera_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise for a folder without A and B, which torch's random numbers alone could make again."""
    check_rank(config, folder)
    if not config.get("save_projection", True):
        raise ValueError(
            f"{folder / CONFIG}: save_projection is false, so the folder lacks A and B; "
            "load it in PEFT and save it again with save_projection=True"
        )


def complete_vera(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """d `[R]` and b `[O]`.

    Raises:
      ValueError: a vector is missing, or its rank is not the config's.
    """
    for name in ("vera_lambda_d", "vera_lambda_b"):
        if name not in matrix:
            raise ValueError(f"{where} has no {name}")
    rank, given = config["r"], len(matrix["vera_lambda_d"])
    if given != rank:
        raise ValueError(f"{where} has rank {given} in {WEIGHTS}, and {rank} in {CONFIG}")
    return matrix | {"vera_active": np.asarray(1, np.float32)}


VERA = PeftMethod(
    peft_type="VERA",
    marker="vera_active",
    suffixes={".vera_lambda_d": "vera_lambda_d", ".vera_lambda_b": "vera_lambda_b"},
    # A `[R, I]` and B `[O, R]` of the layer with the most inputs and outputs.
    shared={"base_model.vera_A": "vera_a", "base_model.vera_B": "vera_b"},
    export=export_vera,
    tensors=vera_tensors,
    config=vera_config,
    check_config=check_vera_config,
    complete=complete_vera,
    dropout="vera_dropout",
)
