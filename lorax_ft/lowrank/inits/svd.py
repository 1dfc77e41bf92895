"""Truncated SVDs of stacks of matrices, W ≈ U_r S_r V_rᵀ.

The exact SVD runs on the host, the randomized one on the device.

Letters: L matrices of the stack, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from threadpoolctl import threadpool_limits

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.mesh_axes import in_auto_axes

OVERSAMPLING = (
    4  # extra columns of the randomized basis, so that the last ones it keeps are accurate
)
CHUNK_BYTES = 2**31  # of matrices in float64 that are decomposed at once
Factors = tuple[Array, Array]
"""A `[L, I, r]` and B `[L, r, O]`."""
HostFactors = tuple[np.ndarray, np.ndarray]


def svd(
    w: Array,
    *,
    rank: int,
    iterations: int | None,
    keys: Array,
    last: bool = False,
) -> Factors:
    """U_r √S_r and √S_r V_rᵀ of a stack of matrices.

    Args:
      w: `[L, I, O]`; for the exact SVD not inside a JAX transformation.
      rank: r.
      iterations: power iterations of the randomized SVD; None: the exact SVD.
      keys: `[L]`, for the randomized SVD.
      last: the r smallest triples, the smallest first, in place of the largest; exact only.

    Returns:
      `[L, I, r]` and `[L, r, O]`, float32.
    """
    if iterations is not None:
        # On a CPU, LAPACK's QR runs in BLAS threads too (see `exact`).
        with threadpool_limits(1, user_api="blas"):
            factors = randomized(w, keys, rank=rank, iterations=iterations)
            # The limit holds only while this block runs, and JAX computes asynchronously.
            return jax.block_until_ready(factors)
    exactly = functools.partial(exact, rank=rank, last=last)
    if w.is_fully_addressable:
        host_w = np.asarray(w)
        a, b = exactly(host_w)
    else:
        a, b = _shared_by_hosts(exactly, w)
    return jnp.asarray(a), jnp.asarray(b)


def nonzero(x: Array) -> Array:
    """x, with 1 in place of 0, to divide by."""
    return jnp.where(x > 0, x, 1)


def on_host(w: Array) -> np.ndarray:
    """The whole array on every host."""
    if w.is_fully_addressable:
        return np.asarray(w)
    return multihost_utils.process_allgather(w, tiled=True)


def root_split(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> HostFactors:
    """U √S and √S Vᵀ."""
    root = np.sqrt(s)
    return u * root, root[:, None] * vt


def exact(w: np.ndarray, *, rank: int, last: bool = False) -> HostFactors:
    """The SVD in float64, on all cores, a matrix on each."""
    one = functools.partial(exact_matrix, rank=rank, last=last)
    return map_matrices(one, w)


def map_matrices(f: Callable[..., HostFactors], *stacks: np.ndarray) -> HostFactors:
    """A and B, stacked, of f(matrix, ...) for the matrices of some stacks, on all cores."""
    # No more BLAS threads than cores, or OpenBLAS's threads wait for each other (up to 50 times
    # slower with numpy 2.4).
    cores = os.cpu_count() or 1
    workers = min(cores, len(stacks[0]))
    threads = threadpool_limits(cores // workers, user_api="blas")
    with threads, ThreadPoolExecutor(workers) as pool:
        pairs = list(pool.map(f, *stacks))
    all_a, all_b = zip(*pairs, strict=True)
    a = np.stack(all_a)
    b = np.stack(all_b)
    return a, b


def at_once(rows: int, columns: int) -> int:
    """How many matrices to decompose at once: one on each core, if they fit into `CHUNK_BYTES`."""
    cores = jax.process_count() * (os.cpu_count() or 1)
    fitting = CHUNK_BYTES // (8 * rows * columns)
    return max(min(cores, fitting), 1)


def exact_matrix(matrix: np.ndarray, *, rank: int, last: bool = False) -> HostFactors:
    """By eigenvectors of the short side's Gram matrix, and an SVD of W in their span, in float64.

    It takes a third of a full SVD's time, with an error of 1e-14 of W. The Gram matrix's
    eigenvalues are S², which loses S below 1e-8 of the largest; the SVD in the span finds them
    again.
    """
    import scipy.linalg

    m = np.asarray(matrix, np.float64)
    rows, columns = m.shape
    wide = rows <= columns
    short = m if wide else m.T  # [n, long]
    n = len(short)
    # eigh sorts in ascending order.
    first_index = 0 if last else n - rank
    wanted = [first_index, first_index + rank - 1]
    gram = short @ short.T
    _, span = scipy.linalg.eigh(gram, subset_by_index=wanted)  # [n, r]
    projected = span.T @ short  # [r, long]
    u, s, vt = np.linalg.svd(projected, full_matrices=False)
    if last:
        u, s, vt = smallest_first(u, s, vt)
    u = span @ u
    # The sign of a pair is free. Fixed by the largest element of u, a smaller rank is a prefix of a
    # larger one.
    largest = np.abs(u).argmax(axis=0)
    sign = np.sign(u[largest, np.arange(rank)])
    near, far = root_split(u * sign, s, vt * sign[:, None])
    a, b = _oriented(near, far, wide=wide)
    return a.astype(np.float32), b.astype(np.float32)


def smallest_first(
    u: np.ndarray,
    s: np.ndarray,
    vt: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The triples U, S and Vᵀ of an SVD in reverse order."""
    return u[:, ::-1], s[::-1], vt[::-1]


def _oriented(near: Any, far: Any, *, wide: bool) -> tuple[Any, Any]:
    """The factors of W, from those of the matrix or its transpose that has the short side first."""
    if wide:
        return near, far
    return far.T, near.T


def _shared_by_hosts(exactly: Callable[[np.ndarray], HostFactors], w: Array) -> HostFactors:
    """`exact` on several hosts: each decomposes some of the matrices, and all get all factors.

    If every host computed all of them, the factors could differ in their last bits.
    """
    hosts = jax.process_count()
    host = jax.process_index()
    whole = on_host(w)
    count = len(whole)
    # allgather needs the same size on every host, so the last matrix may be repeated.
    share = -(-count // hosts)
    assigned = np.arange(share) * hosts + host
    own = np.minimum(assigned, count - 1)
    factors = exactly(whole[own])
    a, b = multihost_utils.process_allgather(factors)  # [hosts, share, ...]
    a = _interleaved(a)
    b = _interleaved(b)
    return a[:count], b[:count]


def _interleaved(parts: np.ndarray) -> np.ndarray:
    """`[hosts, share, ...]` in the order of the matrices: host h has matrix i · hosts + h."""
    by_matrix = np.moveaxis(parts, 0, 1)  # [share, hosts, ...]
    return by_matrix.reshape(-1, *parts.shape[2:])


@functools.partial(jax.jit, static_argnames=("rank", "iterations"))
def randomized(
    w: Array,
    keys: Array,
    *,
    rank: int,
    iterations: int,
) -> Factors:
    """A randomized SVD with power iterations (Halko et al., 0909.4061) of each matrix."""
    one = functools.partial(_randomized_matrix, rank=rank, iterations=iterations)

    def each(w: Array, keys: Array) -> Factors:
        # One matrix at a time, so that temporaries have the size of one.
        return lax.map(lambda pair: one(*pair), (w, keys))

    factors: Factors = in_auto_axes(each, w, keys, like=factors_like)
    return factors


def factors_like(w: Array, *_: Array) -> Factors:
    """Arrays that are split over devices as A `[L, I, r]` and B `[L, r, O]` should be."""
    return w.sum(2, keepdims=True), w.sum(1, keepdims=True)


def _randomized_matrix(
    w: Array,
    key: Array,
    *,
    rank: int,
    iterations: int,
) -> Factors:
    """M ≈ Q Qᵀ M, with M the matrix or its transpose so that Q spans the short side; in float32.

    Q is made orthonormal in every iteration, Q ← qr(M Mᵀ Q): powers alone would lose all but the
    first directions.
    """
    rows, columns = w.shape
    wide = rows <= columns
    short = w if wide else w.T
    m = short.astype(jnp.float32)  # [n, long]
    n, long = m.shape
    width = min(rank + OVERSAMPLING, n)
    noise = jax.random.normal(key, (long, width))
    y = highest_matmul(m, noise)
    for _ in range(iterations):
        q, _ = jnp.linalg.qr(y)
        projected = highest_matmul(m.T, q)
        y = highest_matmul(m, projected)
    q, _ = jnp.linalg.qr(y)  # [n, width]
    b = highest_matmul(q.T, m)  # [width, long]
    gram = highest_matmul(b, b.T)
    squares, u = jnp.linalg.eigh(gram)  # S² and U, ascending
    u = u[:, ::-1][:, :rank]
    squares = squares[::-1][:rank]
    # Rounding may leave a square slightly below 0.
    root = jnp.maximum(squares, 0) ** 0.25  # √S
    near = highest_matmul(q, u) * root
    far = highest_matmul(u.T, b) / nonzero(root)[:, None]
    return _oriented(near, far, wide=wide)
