"""What an adapter method gives to one module."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from lorax_ft.config import AdapterConfig
from lorax_ft.lowrank.spec import LayerSpec

Start = Literal["none", "in_base", "kept"]
"""Where the start of an init is subtracted: nowhere, from the base itself, or in the forward."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which leaves a module gets, with a rank and a scale for each matrix of its stack."""

    spec: LayerSpec
    paths: list[str]
    """The logical paths of the matrices, such as `layers/3/mlp/up_proj`."""
    ranks: np.ndarray
    """`[*L]`; 0 where a matrix is not adapted."""
    scales: np.ndarray
    """alpha / r or alpha / √r, `[*L]` float32; 0 where a matrix is not adapted."""
    width: int
    """R, the columns of A: the largest rank, or the largest that EVA may give."""
    rows: int
    """I, the inputs of each matrix."""
    columns: int
    """O, the outputs of each matrix."""
    config: AdapterConfig
    """The options, from which each term tells whether it is part of the plan."""
    start: Start = "none"
    """Whether A₀ and B₀ are kept, and where they are subtracted."""
