"""Random keys by path, so that adding a target never changes another module's start."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def fold_path(key: Array, path: str) -> Array:
    """A key for the leaf or module at `path`."""
    # crc32, since Python's hash of a string differs from process to process.
    number = zlib.crc32(path.encode())
    return jax.random.fold_in(key, number)


def drawn(
    key: Array,
    paths: list[str],
    name: str,
    sample: Callable[[Array], Array],
) -> Array:
    """`sample(key)` for each matrix of a stack, `[L, ...]`, by its path and the leaf's name."""
    keys = matrix_keys(fold_path(key, name), paths)
    return jax.vmap(sample)(keys)


def matrix_keys(key: Array, paths: list[str]) -> Array:
    """A key for each matrix of a stack, by its logical path.

    Experts share a path, so theirs are told apart by their order in the stack.
    """
    seen: dict[str, int] = {}
    keys = []
    for path in paths:
        place = seen.get(path, 0)
        keys.append(jax.random.fold_in(fold_path(key, path), place))
        seen[path] = place + 1
    return jnp.stack(keys)
