"""IA3 in PEFT: `IA3Config` and the names of its tensors.

Letters: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax_ft import regexes
from lorax_ft.interop.peft_config import CONFIG, shortened
from lorax_ft.interop.peft_methods.method import Matrices, Matrix, PeftMethod


def export_ia3(matrix: Matrix, base_without_start: bool) -> Matrix:
    """The vector."""
    return matrix


def ia3_tensors(matrix: Matrix, is_embedding: bool) -> dict[str, np.ndarray]:
    """The vector of an input as `[1, I]`, of an output as `[O, 1]`.

    Raises:
      ValueError: PEFT's IA3 has no embeddings.
    """
    if is_embedding:
        raise ValueError("PEFT has no IA3 for embeddings; exclude them")
    if "ia3_in" in matrix:
        return {"ia3_l": matrix["ia3_in"][None]}
    return {"ia3_l": matrix["ia3_out"][:, None]}


def ia3_config(adapters: Matrices, modules: Iterable[str]) -> dict[str, Any]:
    """The targets, and which of them scale their input."""
    names = list(modules)
    feedforward = {name: True for name, matrix in adapters.items() if "ia3_in" in matrix}
    return {
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "target_modules": sorted(shortened(dict.fromkeys(adapters, True), names)),
        "feedforward_modules": sorted(shortened(feedforward, names)),
    }


def check_ia3_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise where the modules that scale their input are not names or a regular expression."""
    patterns = config.get("feedforward_modules")
    is_list = isinstance(patterns, list) and all(isinstance(name, str) for name in patterns)
    if not is_list and not isinstance(patterns, str | None):
        raise ValueError(
            f"{folder / CONFIG}: feedforward_modules is {patterns!r}, which is not a valid value"
        )
    if isinstance(patterns, str):
        try:
            regexes.compiled(patterns)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: feedforward_modules: {error}") from error


def complete_ia3(
    matrix: Matrix,
    config: Mapping[str, Any],
    target: str,
    where: str,
) -> Matrix:
    """The vector `[I]` or `[O]`.

    Raises:
      ValueError: its shape is not that of an input's or an output's vector.
    """
    value = matrix["ia3_l"]
    scales_input = _matches_any(config.get("feedforward_modules"), target)
    long_axis = 1 if scales_input else 0
    if value.size != value.shape[long_axis]:
        expected = "[1, in]" if scales_input else "[out, 1]"
        raise ValueError(f"{where}: ia3_l has the shape {value.shape}; it must be {expected}")
    name = "ia3_in" if scales_input else "ia3_out"
    return {name: value.reshape(-1), "ia3_active": np.asarray(1, np.float32)}


IA3 = PeftMethod(
    peft_type="IA3",
    marker="ia3_active",
    suffixes={".ia3_l": "ia3_l"},
    export=export_ia3,
    tensors=ia3_tensors,
    config=ia3_config,
    check_config=check_ia3_config,
    complete=complete_ia3,
)


def _matches_any(patterns: Any, module: str) -> bool:
    """Whether PEFT's patterns, a list of names and suffixes or a regular expression, match."""
    if isinstance(patterns, str):
        return regexes.fullmatch(patterns, module)
    return any(module.endswith(pattern) for pattern in patterns or ())
