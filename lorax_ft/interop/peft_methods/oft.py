"""OFT in PEFT: `OFTConfig` and the names of its tensors.

Letters: I inputs, K blocks of size b, P the pairs b (b − 1) / 2 above a diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft.interop.peft_config import CONFIG, shortened
from lorax_ft.interop.peft_methods.method import Matrices, Matrix, PeftMethod
from lorax_ft.lowrank.terms.oft import block_size, side

ONLY = {
    "coft": False,
    "block_share": False,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
}
"""The values of those fields that change numbers; PEFT has them by default."""


def export_oft(matrix: Matrix, base_without_start: bool) -> Matrix:
    """The elements of the skew-symmetric matrices."""
    return matrix


def oft_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """The elements `[K, P]`."""
    return {"oft_R.weight": matrix["oft_pairs"]}


def oft_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The block size and the targets.

    Raises:
      ValueError: no block size gives PEFT's modules blocks of these sizes.
    """
    return {
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "module_dropout": 0.0,
        **ONLY,
        "r": 0,
        "oft_block_size": _block_size(adapters),
        "target_modules": sorted(shortened(dict.fromkeys(adapters, True), modules)),
    }


def check_oft_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise for OFT's variants, whose rotations are others."""
    for name, value in ONLY.items():
        given = config.get(name, value)
        if given != value:
            raise ValueError(
                f"{folder / CONFIG}: {name} is {given!r}, which is not supported; it must be "
                f"{value!r}"
            )


def complete_oft(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """The elements `[K, P]`."""
    return matrix | {"oft_active": np.asarray(1, np.float32)}


def check_oft_fits(matrix: Matrix, inputs: int, outputs: int, where: str) -> None:
    """Raise where the blocks are not as many as the module's inputs."""
    blocks, pairs = matrix["oft_pairs"].shape
    if blocks * side(pairs) != inputs:
        raise ValueError(
            f"{where} has {blocks} blocks of {side(pairs)}; the model's module has {inputs} inputs"
        )


OFT = PeftMethod(
    peft_type="OFT",
    marker="oft_active",
    suffixes={".oft_R.weight": "oft_pairs"},
    export=export_oft,
    tensors=oft_tensors,
    config=oft_config,
    check_config=check_oft_config,
    complete=complete_oft,
    check_fits=check_oft_fits,
)


def _block_size(adapters: Matrices) -> int:
    """The `oft_block_size` with which PEFT's modules have blocks of these sizes."""
    sizes = set()
    for matrix in adapters.values():
        blocks, pairs = matrix["oft_pairs"].shape
        b = side(pairs)
        sizes.add((blocks * b, b))
    largest = max(inputs for inputs, _ in sizes)
    for wanted in range(1, largest + 1):
        if all(block_size(inputs, wanted) == b for inputs, b in sizes):
            return wanted
    raise ValueError(
        "PEFT's OFT has one oft_block_size, and the adapters have blocks of several "
        f"sizes by inputs: {sorted(sizes)}"
    )
