"""Tensors that stay in their file: shapes are known at once, values are read on demand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from lorax_ft.files import check_regular
from lorax_ft.tree import Shape

# safetensors' name -> NumPy dtype.
FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
FLOATS_AND_BYTES = FLOATS | {"U8": np.uint8}
FLOATS_AND_INDICES = FLOATS | {"I32": np.int32}

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]
"""Returns the slice of an array at an index, or all of it for (). It may be a view of a file."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint."""

    shape: Shape
    read: Read


Tensors = Mapping[str, LazyTensor]
"""A checkpoint's tensors by name."""


def lazy_tensors(file: Path, *, dtypes: Mapping[str, Any] = FLOATS) -> dict[str, LazyTensor]:
    """Returns the tensors of a safetensors file by name, as views of the file.

    Args:
      file: the file.
      dtypes: the accepted dtypes, safetensors' name -> NumPy dtype.

    Raises:
      ValueError: the file is missing or damaged, or holds a tensor of another dtype.
    """
    header, content = _map_file(file)
    tensors = {}
    for name, entry in header.items():
        dtype = entry["dtype"]
        if dtype not in dtypes:
            raise ValueError(f"{file}: {name} is {dtype}; supported: {', '.join(dtypes)}")
        begin, end = entry["data_offsets"]
        values = content[begin:end].view(dtypes[dtype])
        tensor = values.reshape(entry["shape"])
        tensors[name] = LazyTensor(tensor.shape, read=tensor.__getitem__)
    return tensors


def all_finite(values: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor infinity; integers and booleans never do.

    The bits of these are above those of all other numbers of their sign. Two maxima of integers
    need no memory, and for bfloat16 a tenth of the time of `np.isfinite`.
    """
    if values.size == 0 or values.dtype.kind in "iub":
        return True
    kinds = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32), 8: (np.int64, np.uint64)}
    signed, unsigned = kinds[values.dtype.itemsize]
    infinity, negative = np.array([np.inf, -np.inf]).astype(values.dtype).view(unsigned)
    is_finite = values.view(signed).max() < infinity and values.view(unsigned).max() < negative
    return bool(is_finite)


def _map_file(file: Path) -> tuple[dict[str, dict[str, Any]], np.ndarray]:
    """Returns the header's entry for each tensor, and the bytes that its offsets point into."""
    try:
        check_regular(file)
        # safetensors validates the header, but its reader copies every tensor, so the file is
        # mapped here: the header's length in 8 bytes, the header in JSON, then the data.
        with safetensors.safe_open(file, framework="numpy") as handle:
            names = handle.keys()
        with open(file, "rb") as opened:
            length = opened.read(8)
            text = opened.read(int.from_bytes(length, "little"))
            header = json.loads(text)
            start = opened.tell()
        # np.memmap cannot map the 0 bytes of a file without tensors.
        content: np.ndarray = np.empty(0, np.uint8)
        if start < file.stat().st_size:
            content = np.memmap(file, np.uint8, mode="r", offset=start)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    # The header also holds "__metadata__", which `names` leaves out.
    return {name: header[name] for name in names}, content
