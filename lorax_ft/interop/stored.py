"""Tensors as they lie in files: their shapes, and any part of them, read when it is asked for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

KINDS = ("F64", "F32", "F16", "BF16")
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]
    """The part of it in these slices; all of it for ()."""


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name.

    Raises:
      ValueError: the file is missing or damaged.
    """
    try:
        handle = safetensors.safe_open(file, framework="numpy")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        kinds = {name: part.get_dtype() for name, part in slices.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if other := [name for name, kind in kinds.items() if kind not in KINDS]:
        raise ValueError(f"{file}: {other[0]} is {kinds[other[0]]}; supported: {', '.join(KINDS)}")
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    return {name: Stored(shape, functools.partial(_read, handle, name)) for name, shape in shapes.items()}


def _read(handle: Any, name: str, index: Index) -> np.ndarray:
    array: np.ndarray = handle.get_slice(name)[index] if index else handle.get_tensor(name)
    return array
