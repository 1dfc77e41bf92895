"""Attention over rows whose tokens are split over devices: the mesh axis `context`.

Everything else in a decoder is computed token by token, where the tokens are. For attention each
device gathers the keys and values of its whole rows and attends with its own queries, as in the
training of Llama 3 (2407.21783, section 3.3.2): masks, segments, windows, sinks and caps are those
of one device. In the backward pass the gradients of keys and values are summed and scattered.

Shapes: B batch, T tokens of a row, N devices along the axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.mesh_axes import TOKEN_AXIS, token_devices


def map_devices(function: Callable[..., Any], *, in_specs: Any, out_specs: Any) -> Any:
    """`function` on each device's own part of its arguments, over all axes of the ambient mesh."""
    # Neither Pallas nor cuDNN can be partitioned by XLA. The values of scans within start from
    # zeros that are the same on all devices, which check_vma forbids.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def whole_row(x: Array, *, axis: int) -> Array:
    """A device's T / N tokens, which are on `axis`, and those of the others: T tokens."""
    if token_devices() == 1:
        return x
    return lax.all_gather(x, TOKEN_AXIS, axis=axis, tiled=True)


def own_places(tokens: int) -> Array:
    """The places in the row of a device's `tokens` tokens."""
    return lax.axis_index(TOKEN_AXIS) * tokens + jnp.arange(tokens)


def balanced(x: Array, *, axis: int) -> Array:
    """A device's tokens, with the second half of them exchanged for that of the opposite device.

    Later tokens see more keys. Of 2 N halves in a row, device i has the halves 2 i and 2 i + 1
    before, and 2 i and 2 (N - 1 - i) + 1 after: all devices see as many keys. Balanced again, the
    tokens are back in their places.
    """
    devices = token_devices()
    if devices == 1:
        return x
    first, second = jnp.split(x, 2, axis=axis)
    opposite = [(device, devices - 1 - device) for device in range(devices)]
    second = lax.ppermute(second, TOKEN_AXIS, opposite)
    return jnp.concatenate([first, second], axis=axis)
