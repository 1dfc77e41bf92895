"""MiSS in PEFT: `MissConfig` and the names of its tensors.

Letters: O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.peft_config import CONFIG, WEIGHTS, check_rank, one_rank, shortened
from lorax_ft.interop.peft_methods.method import Matrices, Matrix, PeftMethod


def export_miss(matrix: Matrix, base_without_start: bool) -> Matrix:
    """D without padding."""
    return matrix | {"miss_block": matrix["miss_block"][: int(matrix["miss_rank"])]}


def miss_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """D `[R, O]`.

    Raises:
      ValueError: PEFT's MiSS has no embeddings.
    """
    if is_embedding:
        raise ValueError("PEFT has no MiSS for embeddings; exclude them")
    return {"miss_block": matrix["miss_block"]}


def miss_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The rank and the targets.

    Raises:
      ValueError: there are several ranks.
    """
    ranks = {int(matrix["miss_rank"]) for matrix in adapters.values()}
    return {
        "bias": "none",
        "init_weights": True,
        "r": one_rank(ranks, "MiSS"),
        "target_modules": sorted(shortened(dict.fromkeys(adapters, True), modules)),
    }


def check_miss_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise for MiSS's variants, whose blocks mean something else, and for a rank that is none."""
    if not isinstance(config.get("init_weights", True), bool):
        raise ValueError(
            f"{folder} uses init_weights {config['init_weights']!r} in its {CONFIG}, which is not "
            "supported"
        )
    check_rank(config, folder)


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
