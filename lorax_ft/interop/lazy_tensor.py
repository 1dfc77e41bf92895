"""Tensors as they lie in files: their shapes, and any part of them, read when it is asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
KINDS = FLOATS | {"U8": np.uint8}
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]
    """The part of it in these slices; all of it for (). May be a view of the file."""


def lazy_tensors(file: Path, *, kinds: Mapping[str, Any] = FLOATS) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, by name.

    The package checks the file; the tensors are views of it, where the package would copy each.

    Args:
      file: the file.
      kinds: the dtypes that it may hold: numpy's by safetensors' names.

    Raises:
      ValueError: the file is missing or damaged, or holds another dtype.
    """
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            names = handle.keys()
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            start = opened.tell()
        content = (
            np.memmap(file, np.uint8, mode="r", offset=start)
            if start < file.stat().st_size
            else np.empty(0, np.uint8)
        )
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if other := [name for name in names if header[name]["dtype"] not in kinds]:
        raise ValueError(
            f"{file}: {other[0]} is {header[other[0]]['dtype']}; supported: {', '.join(kinds)}"
        )

    def stored(entry: dict) -> LazyTensor:
        begin, end = entry["data_offsets"]
        view = content[begin:end].view(kinds[entry["dtype"]]).reshape(entry["shape"])
        return LazyTensor(view.shape, view.__getitem__)

    return {name: stored(header[name]) for name in names}
