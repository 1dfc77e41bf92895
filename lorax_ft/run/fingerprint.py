"""Fingerprints of what a run trains on, so that a resumed run notices exchanged data or weights.

The data are hashed as the model sees them: tokens, labels and rows, whatever files they came from.
The weights are hashed where they lie, on the devices, with sums that do not depend on how they are
sharded. Any single change changes the sums; of others, one in 2^64 goes unnoticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lorax_ft.data.dataset import Dataset
from lorax_ft.data.splits import Split
from lorax_ft.quant.kernels import format_of
from lorax_ft.schema import is_base
from lorax_ft.tree import Tree, flatten

# Odd numbers that set the places of an array apart, one for each axis.
AXES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)
WEIGHTS = "weights of "


def fingerprint(params: Tree, data: Dataset) -> dict[str, str]:
    """A checksum of the training rows, of each validation set, and of each leaf of the base.

    Args:
      params: the base, with or without adapters, which are left out.
      data: the data of the run.
    """
    found = {"training rows": split_checksum(data.train)}
    for name, split in data.validation_sets.items():
        found[f"validation rows {name}".rstrip()] = split_checksum(split)
    return found | weights_checksums(params)


def check_same_inputs(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise if two fingerprints differ.

    Args:
      expected: of the run to go on with.
      found: of the run that goes on.

    Raises:
      ValueError: they do; the error names the first part that differs.
    """
    # The format of a quantized leaf stands in its name, with the backend that computed it: another
    # one may round in another way.
    for name in found.keys() & expected.keys():
        if found[name] != expected[name]:
            option = "model.path" if name.startswith(WEIGHTS) else "data.train and data.validation"
            raise ValueError(
                f"the {name} are not those that the run in train.output was trained with; give "
                f"the same {option}, --train.overwrite to begin anew, or another --train.output"
            )


def split_checksum(split: Split) -> str:
    """The SHA-256 of a split's tokens and labels, and of the rows that they make up."""
    rows = split.rows
    digest = hashlib.sha256()
    for values in (rows.samples.tokens, rows.samples.mask, rows.samples.borders):
        digest.update(np.ascontiguousarray(values).data)
    for values in (rows.pieces, rows.borders):
        digest.update(np.ascontiguousarray(values).data)
    digest.update(repr(split.sets).encode())
    return digest.hexdigest()


def weights_checksums(params: Tree) -> dict[str, str]:
    """A checksum of each leaf of the base, by its path."""
    leaves = {}
    for path, leaf in flatten(params).items():
        if not is_base(path):
            continue
        name = f"{WEIGHTS}{path}"
        if format_of(leaf) is not None:
            name += f" ({format_of(leaf)}, {jax.default_backend()})"
        leaves[name] = jax.tree.leaves(leaf)
    return _fetched(leaves)


def leaf_checksums(tree: Tree) -> dict[str, str]:
    """A checksum of each leaf, by its path, which does not depend on how the leaf is sharded."""
    leaves = {path: jax.tree.leaves(leaf) for path, leaf in flatten(tree).items()}
    return _fetched(leaves)


def _fetched(leaves: Mapping[str, list[Array]]) -> dict[str, str]:
    """The sums of leaves as hexadecimal numbers."""
    sums = jax.device_get(jax.jit(_sums)(leaves))
    return {name: "".join(f"{int(value):08x}" for value in its) for name, its in sums.items()}


def _sums(leaves: Mapping[str, list[Array]]) -> dict[str, list[Array]]:
    found: dict[str, list[Array]] = {}
    for name, parts in leaves.items():
        found[name] = [value for part in parts for value in _two_sums(part)]
    return found


def _two_sums(leaf: Array) -> tuple[Array, Array]:
    """Two sums over the bits of an array, modulo 2^32, each with its own odd factor per place.

    Sums of integers do not depend on their order, and so not on the mesh. A factor that is odd
    keeps every change of one element.
    """
    bits = _bits(leaf)
    # Weights that were in bfloat16 have nothing in the lower half, where products would end.
    bits = bits ^ (bits >> 16)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        along = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place += (along + jnp.uint32(1)) * jnp.uint32(AXES[axis])
    mixed = (place ^ (place >> 16)) * jnp.uint32(0x7FEB352D)
    swapped = (mixed >> 16) | (mixed << 16)
    one = jnp.uint32(1)
    return jnp.sum(bits * (mixed | one)), jnp.sum(bits * (swapped | one))


def _bits(leaf: Array) -> Array:
    """The elements of an array as unsigned integers of 32 bits."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits: Array = lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    return bits
