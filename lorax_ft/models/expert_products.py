"""The products of sorted rows with the kernels of their experts, on one device.

Only chosen experts compute, so that the cost is that of `top_k` experts and not of all. There are
two forms: `ragged` is XLA's own product of ragged groups, for accelerators; `by_block` multiplies
one block of rows after another, for CPUs. Of quantized kernels few are dense at a time.

Shapes: M rows, E experts, I inputs, O outputs; C blocks of R rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_ft.lowrank.experts import Rows
from lorax_ft.quant.kernels import Quantized, dense

DENSE_BYTES = 64 * 2**20
"""Of quantized kernels, so many bytes are dense at a time, or one kernel."""


def ragged(x: Array, kernels: Array | Quantized, rows: Rows) -> Array:
    """By XLA's own product of ragged groups; quantized kernels are dense a batch at a time."""
    if isinstance(kernels, Quantized) and _batch_size(kernels, x.dtype) < len(rows.sizes):
        return _ragged_quantized(x, kernels, rows.sizes)
    return lax.ragged_dot(x, dense(kernels, x.dtype), rows.sizes)


def _batch_size(kernels: Quantized, dtype: Any) -> int:
    """The most experts that divide their number and whose kernels take at most `DENSE_BYTES`."""
    experts, *matrix = kernels.shape
    size = math.prod(matrix) * jnp.dtype(dtype).itemsize
    fitting = [n for n in range(1, experts + 1) if experts % n == 0 and n * size <= DENSE_BYTES]
    return max(fitting, default=1)


@jax.custom_vjp
def _ragged_quantized(x: Array, kernels: Quantized, sizes: Array) -> Array:
    """Rows `[M, I]`, of which each expert has `[E]`, times frozen kernels `[E, I, O]`."""
    return _by_batch(x, kernels, sizes, transposed=False)


def _ragged_forward(x: Array, kernels: Quantized, sizes: Array) -> tuple[Array, tuple[Any, ...]]:
    return _ragged_quantized(x, kernels, sizes), (kernels, sizes)


def _ragged_backward(residuals: tuple[Any, ...], g: Array) -> tuple[Array, None, None]:
    """dx = g Wᵀ. JAX has no such rule for loops whose length depends on data."""
    kernels, sizes = residuals
    return _by_batch(g, kernels, sizes, transposed=True), None, None


_ragged_quantized.defvjp(_ragged_forward, _ragged_backward)


def _by_batch(x: Array, kernels: Quantized, sizes: Array, *, transposed: bool) -> Array:
    """The products of one batch of experts after another.

    The rows of a batch, of which there may be any number, are multiplied in chunks: as many rows as
    a batch has on average, so that all chunks together have at most twice as many rows as x.
    """
    batch = _batch_size(kernels, x.dtype)
    batches = len(sizes) // batch
    chunk = -(-len(x) // batches)
    by_batch = jax.tree.map(lambda part: part.reshape(batches, batch, *part.shape[1:]), kernels)
    ends = jnp.cumsum(sizes).reshape(batches, batch)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1, -1]])
    # The last chunk may reach past the last row.
    x = jnp.pad(x, [(0, chunk), (0, 0)])
    outs = kernels.shape[1 if transposed else 2]

    def multiply(y: Array, operands: tuple[Any, Array, Array]) -> tuple[Array, None]:
        kernels, start, ends = operands
        weights = dense(kernels, x.dtype)
        if transposed:
            weights = weights.swapaxes(1, 2)

        def add_chunk(i: Array, y: Array) -> Array:
            first = start + i * chunk
            within = jnp.clip(ends - first, 0, chunk)
            rows = lax.dynamic_slice_in_dim(x, first, chunk)
            part = lax.ragged_dot(rows, weights, jnp.diff(within, prepend=0))
            # Rows of the next batch are 0 in it.
            part += lax.dynamic_slice_in_dim(y, first, chunk)
            return lax.dynamic_update_slice_in_dim(y, part, first, axis=0)

        chunks = -(-(ends[-1] - start) // chunk)
        return lax.fori_loop(0, chunks, add_chunk, y), None

    zeros = jnp.zeros((len(x), outs), x.dtype)
    y, _ = lax.scan(multiply, zeros, (by_batch, starts, ends))
    return y[:-chunk]


def by_block(x: Array, kernels: Array | Quantized, rows: Rows, *, block: int) -> Array:
    """One block after another, each with one kernel; of quantized ones one is dense at a time."""
    blocks = x.reshape(-1, block, x.shape[-1])
    expert = rows.expert[::block]
    used = jnp.arange(len(blocks)) * block < jnp.sum(rows.sizes)
    if isinstance(kernels, Quantized):
        # Frozen: the gradient goes to x alone.
        kernels = lax.stop_gradient(kernels)

        @jax.checkpoint
        def multiply(x: Array, expert: Array) -> Array:
            return x @ dense(_kernel_of(kernels, expert), x.dtype)

        y = lax.map(functools.partial(_if_used, multiply), (used, blocks, expert))
    else:
        y = _multiply_blocks(blocks, kernels, expert, used)
    return y.reshape(len(x), -1)


def _if_used(multiply: Callable[..., Array], block: tuple[Array, ...]) -> Array:
    """The product of a block, `(used, *arguments)`; 0 where it holds padding alone.

    Most do where a device has room for more copies than chose its experts.
    """
    used, *arguments = block
    shape = jax.eval_shape(multiply, *arguments)

    def padding(*arguments: Array) -> Array:
        return jnp.zeros(shape.shape, shape.dtype)

    return lax.cond(used, multiply, padding, *arguments)


def _kernel_of(kernels: Any, expert: Array) -> Any:
    """One expert's kernel, of arrays or quantized leaves `[E, ...]`."""

    def take(leaf: Array) -> Array:
        return lax.dynamic_index_in_dim(leaf, expert, keepdims=False)

    return jax.tree.map(take, kernels)


@jax.custom_vjp
def _multiply_blocks(x: Array, kernels: Array, expert: Array, used: Array) -> Array:
    """x `[C, R, I]` of C blocks times the kernel `[I, O]` of each one's expert."""

    def multiply(x: Array, expert: Array) -> Array:
        return x @ _kernel_of(kernels, expert)

    return lax.map(functools.partial(_if_used, multiply), (used, x, expert))


def _forward(
    x: Array, kernels: Array, expert: Array, used: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _multiply_blocks(x, kernels, expert, used), (x, kernels, expert, used)


def _backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array, None, None]:
    """dx = g Wᵀ, and dW = Σ xᵀ g over the blocks of each expert, added up in place.

    JAX's own rule would make an array of all kernels for each block. XLA leaves out the second loop
    where the kernels are frozen.
    """
    x, kernels, expert, used = residuals

    def multiply(g: Array, expert: Array) -> Array:
        return g @ _kernel_of(kernels, expert).T

    dx = lax.map(functools.partial(_if_used, multiply), (used, g, expert))

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, g, expert = block
        # In float32 also of bfloat16, as there are many blocks.
        return total.at[expert].add(jnp.matmul(x.T, g, preferred_element_type=total.dtype)), None

    total, _ = lax.scan(add, jnp.zeros(kernels.shape, jnp.float32), (x, g, expert))
    return dx, total.astype(kernels.dtype), None, None


_multiply_blocks.defvjp(_forward, _backward)
