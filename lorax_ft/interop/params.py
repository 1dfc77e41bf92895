"""Reads a decoder's parameters from the tensors of a checkpoint.

A leaf stacks the tensors of all layers, and of all experts, in one array.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from lorax_ft.interop.huggingface import Names, hf_names
from lorax_ft.interop.lazy_tensor import Index, LazyTensor, Read, Tensors, all_finite
from lorax_ft.models.config import DecoderConfig
from lorax_ft.models.model import abstract_params
from lorax_ft.tree import Shape, Tree, flatten, unflatten

Parts = Mapping[Shape, LazyTensor]
"""The tensors that a leaf stacks, by their index in the stack."""
Place = Callable[[str, Shape, Read, Parts], Any]
"""Puts a leaf on its devices: (slash path, shape, how to read it, what it stacks) -> leaf."""

# How many tensors are read at once: copying releases the GIL.
READERS = 4
# Bytes. JAX uses a NumPy buffer on a CPU without a copy only if it is aligned like this.
ALIGNMENT = 64


def load_params(
    config: DecoderConfig,
    tensors: Tensors,
    *,
    names: Names,
    source: str,
    place: Place,
) -> Tree:
    """Reads the parameters of a decoder, tensor by tensor, in the dtype of its config.

    Raises:
      ValueError: a tensor is missing, unexpected, or has another shape, or holds a number that is
        not finite in this dtype.
    """
    abstract = flatten(abstract_params(config))
    stacked = {}
    expected = {}
    for path, leaf in abstract.items():
        stacked[path] = list(hf_names(path, leaf.shape, names))
        for name, index in stacked[path]:
            shape = leaf.shape[len(index) :]
            if path.endswith("/kernel"):
                # PyTorch stores [out, in].
                shape = shape[::-1]
            expected[name] = shape
    # All tensors are checked before any is read, since reading takes minutes for large models.
    _check_names(tensors, set(expected), config, source=source)
    _check_shapes(tensors, expected, source=source)

    params = {}
    for path, leaf in abstract.items():
        parts = {}
        views = {}
        for name, index in stacked[path]:
            parts[index] = tensors[name]
            view = tensors[name]
            if path.endswith("/kernel"):
                view = _transposed(view)
            views[index] = _Named(f"{source}: {name}", view)
        read = functools.partial(_read_leaf, views, leaf.shape, config.dtype)
        params[path] = place(path, leaf.shape, read, parts)
    return unflatten(params)


def _check_names(
    tensors: Tensors,
    expected: set[str],
    config: DecoderConfig,
    *,
    source: str,
) -> None:
    """Raises a `ValueError` if a tensor is missing or unexpected."""
    missing = sorted(expected - tensors.keys())
    if missing:
        raise ValueError(f"{source} lacks the tensor {_first(missing)}")
    extra = []
    for name in sorted(tensors.keys() - expected):
        if not _ignored(name, config):
            extra.append(name)
    if extra:
        raise ValueError(
            f"{source} holds the tensor {_first(extra)}, which its architecture does not have"
        )


def _ignored(name: str, config: DecoderConfig) -> bool:
    # Old Llama checkpoints store the rotary frequencies, which the config determines.
    if name.endswith("rotary_emb.inv_freq"):
        return True
    # Some checkpoints store a tied head, a copy of the embedding table (see `head_is_table`).
    return name == "lm_head.weight" and config.tied


def _first(names: list[str]) -> str:
    """The first name and how many follow it, for an error."""
    first, *others = names
    if not others:
        return first
    return f"{first} and {len(others)} more"


def _check_shapes(tensors: Tensors, expected: Mapping[str, Shape], *, source: str) -> None:
    """Raises a `ValueError` if a tensor has another shape than expected, in PyTorch's order."""
    for name, shape in expected.items():
        given = tensors[name].shape
        if given != shape:
            raise ValueError(f"{source}: {name} has the shape {given}, not {shape}")


def head_is_table(tensors: Tensors) -> bool:
    """Whether a checkpoint has no output head of its own, or one that equals the embedding table.

    If the two differ, transformers unties the head although the config ties it.
    """
    head = tensors.get("lm_head.weight")
    table = tensors.get("model.embed_tokens.weight")
    if head is None or table is None:
        return True
    return np.array_equal(head.read(()), table.read(()))


def _transposed(tensor: LazyTensor) -> LazyTensor:
    """A matrix `[out, in]` as `[in, out]`."""

    def read(index: Index) -> np.ndarray:
        return tensor.read(index[::-1]).T

    return LazyTensor(tensor.shape[::-1], read)


class _Named(NamedTuple):
    """A tensor, and what to call it in an error."""

    name: str
    tensor: LazyTensor


def _read_leaf(parts: Mapping[Shape, _Named], shape: Shape, dtype: str, index: Index) -> np.ndarray:
    """Reads the slice `index` of a leaf `[*stack, in, out]` that stacks `parts`."""
    some_place = next(iter(parts))
    n_stack = len(some_place)
    matrix = index[n_stack:]
    # The places along each axis that the slice covers.
    ranges = []
    for size, part in zip(shape, index, strict=True):
        ranges.append(range(size)[part])
    leaf_shape = [len(places) for places in ranges]
    leaf = _aligned_empty(leaf_shape, np.dtype(dtype))
    # Where the matrices of the slice go in `leaf`, and where they are in the whole stack.
    targets = np.ndindex(*leaf.shape[:n_stack])
    sources = itertools.product(*ranges[:n_stack])

    def fill(target: Shape, source: Shape) -> None:
        name, tensor = parts[source]
        # A cast to bfloat16 may overflow, which the next line finds.
        with np.errstate(over="ignore"):
            leaf[target] = tensor.read(matrix)
        if not all_finite(leaf[target]):
            raise ValueError(
                f"{name} holds values that are not finite in {dtype}, so every loss would be NaN; "
                "is the checkpoint damaged, or a model.dtype too small for it?"
            )

    with ThreadPoolExecutor(READERS) as pool:
        # `list` waits for all of them and raises the first error.
        list(pool.map(fill, targets, sources))
    return leaf


def _aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array that JAX can use on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    # Bytes to the next address that is a multiple.
    start = -raw.ctypes.data % ALIGNMENT
    end = start + size
    aligned = raw[start:end]
    return aligned.view(dtype).reshape(shape)
