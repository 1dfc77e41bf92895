"""What PEFT's adapter types have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax_ft.interop.lazy_tensor import FLOATS

Matrix = dict[str, np.ndarray]
"""The leaves of one adapted matrix, by name."""
Matrices = Mapping[str, Matrix]
"""The same by the full name of the module in the checkpoint."""


def _fits(matrix: Matrix, inputs: int, outputs: int, where: str) -> None:
    """The shapes of all leaves are checked anyway."""


def _as_they_are(adapters: Mapping[str, Matrix]) -> Mapping[str, Matrix]:
    return adapters


class PeftMethod(NamedTuple):
    """One of PEFT's adapter types."""

    peft_type: str
    marker: str
    """A leaf that every adapter of this type has, and no other."""
    suffixes: Mapping[str, str]
    """What a tensor's name ends with, and the leaf that it is."""
    export: Callable[[Matrix, bool], Matrix]
    """(leaves, whether the base in the folder is without the start) -> leaves without padding."""
    tensors: Callable[[Matrix, bool], Mapping[str, np.ndarray]]
    """(leaves, whether the module is an embedding) -> tensors by the end of their names."""
    config: Callable[[Matrices, Iterable[str]], dict[str, Any]]
    """(all adapters, full names of all modules) -> fields of adapter_config.json."""
    check_config: Callable[[Mapping[str, Any], Path], None]
    """Raises where the config has an option that changes numbers and is not supported."""
    complete: Callable[[Matrix, Mapping[str, Any], str, str], Matrix]
    """(tensors as read, config, PEFT's name of the target, place for errors) -> all leaves."""
    check_fits: Callable[[Matrix, int, int, str], None] = _fits
    """(all leaves, the module's inputs, its outputs, place for errors): raises where the leaves are
    for other sizes, if their shapes alone do not say so."""
    fit: Callable[[Mapping[str, Matrix]], Mapping[str, Matrix]] = _as_they_are
    """The adapters by path in a form that one config describes, such as all of one rank."""
    dtypes: Mapping[str, Any] = FLOATS
    """Of the tensors in a folder (`lorax_ft.interop.lazy_tensor`)."""
    shared: Mapping[str, str] = {}
    """The full names of tensors that all modules share, and the leaves, transposed, they are."""
    dropout: str | None = None
    """The field of the config that holds the dropout rate."""
