"""Truncated SVDs of stacks of matrices, W ≈ U_r S_r V_rᵀ: exact on the host, randomized on the device.

Letters: L matrices of the stack, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from threadpoolctl import threadpool_limits

OVERSAMPLING = 4  # further columns of the randomized basis, which make its last ones accurate
Factors = tuple[Array, Array]
"""A `[L, I, r]` and B `[L, r, O]`."""
HostFactors = tuple[np.ndarray, np.ndarray]


def svd(w: Array, *, rank: int, iterations: int | None, keys: Array, last: bool = False) -> Factors:
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
        with threadpool_limits(1, user_api="blas"):  # LAPACK's QR, on a CPU
            return jax.block_until_ready(randomized(w, keys, rank=rank, iterations=iterations))
    exactly = functools.partial(exact, rank=rank, last=last)
    if w.is_fully_addressable:
        a, b = exactly(np.asarray(w))
    else:
        a, b = _shared_by_hosts(exactly, w)
    return jnp.asarray(a), jnp.asarray(b)


def product(a: Array, b: Array) -> Array:
    """A B of a stack, in float32 at the highest precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


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
    # One BLAS thread a matrix: with more, OpenBLAS's threads wait for each other (up to 50 times
    # slower with numpy 2.4).
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = list(pool.map(functools.partial(exact_matrix, rank=rank, last=last), w))
    return np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs])


def exact_matrix(matrix: np.ndarray, *, rank: int, last: bool = False) -> HostFactors:
    """By eigenvectors of the short side's Gram matrix, and an SVD of W in their span, in float64.

    It takes a third of a full SVD's time, with an error of 1e-14 of W. The Gram matrix's eigenvalues
    are S², which loses S below 1e-8 of the largest; the SVD in the span finds them again.
    """
    import scipy.linalg

    m = np.asarray(matrix, np.float64)
    wide = m.shape[0] <= m.shape[1]
    short = m if wide else m.T  # [n, long]
    n = short.shape[0]
    wanted = [0, rank - 1] if last else [n - rank, n - 1]  # eigh's order is ascending
    _, span = scipy.linalg.eigh(short @ short.T, subset_by_index=wanted)
    u, s, vt = np.linalg.svd(span.T @ short, full_matrices=False)
    if last:  # the smallest first
        u, s, vt = u[:, ::-1], s[::-1], vt[::-1]
    u = span @ u
    # The sign of a pair is free. Fixed by the largest element of u, a smaller rank is a prefix of a
    # larger one.
    sign = np.sign(u[np.abs(u).argmax(axis=0), np.arange(rank)])
    near, far = root_split(u * sign, s, vt * sign[:, None])
    a, b = (near, far) if wide else (far.T, near.T)
    return a.astype(np.float32), b.astype(np.float32)


def _shared_by_hosts(exactly: Callable[[np.ndarray], HostFactors], w: Array) -> HostFactors:
    """`exact` on several hosts: each decomposes some of the matrices, and all get all factors.

    Decomposed on every host, the factors could differ in their last bits.
    """
    hosts, host = jax.process_count(), jax.process_index()
    whole = on_host(w)
    share = -(-len(whole) // hosts)  # allgather needs equal sizes: the last matrix may be repeated
    own = np.minimum(np.arange(share) * hosts + host, len(whole) - 1)
    a, b = multihost_utils.process_allgather(exactly(whole[own]))  # [hosts, share, ...]
    return _interleaved(a)[: len(whole)], _interleaved(b)[: len(whole)]


def _interleaved(parts: np.ndarray) -> np.ndarray:
    """`[hosts, share, ...]` in the order of the matrices: host h has matrix i · hosts + h."""
    return np.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])


@functools.partial(jax.jit, static_argnames=("rank", "iterations"))
def randomized(w: Array, keys: Array, *, rank: int, iterations: int) -> Factors:
    """A randomized SVD with power iterations (Halko et al., 0909.4061) of each matrix of a stack."""
    one = functools.partial(_randomized_matrix, rank=rank, iterations=iterations)
    return lax.map(lambda pair: one(*pair), (w, keys))


def _randomized_matrix(w: Array, key: Array, *, rank: int, iterations: int) -> Factors:
    """M ≈ Q Qᵀ M, with M the matrix or its transpose so that Q spans the short side; in float32.

    Q is made orthonormal in every iteration, Q ← qr(M Mᵀ Q): powers alone would lose all but the
    first directions.
    """
    matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    wide = w.shape[0] <= w.shape[1]
    m = (w if wide else w.T).astype(jnp.float32)  # [n, long]
    columns = min(rank + OVERSAMPLING, m.shape[0])
    y = matmul(m, jax.random.normal(key, (m.shape[1], columns)))
    for _ in range(iterations):
        q, _ = jnp.linalg.qr(y)
        y = matmul(m, matmul(m.T, q))
    q, _ = jnp.linalg.qr(y)
    b = matmul(q.T, m)
    squares, u = jnp.linalg.eigh(matmul(b, b.T))  # S² and U, ascending
    u = u[:, ::-1][:, :rank]
    root = jnp.maximum(squares[::-1][:rank], 0) ** 0.25  # √S
    near = matmul(q, u) * root
    far = matmul(u.T, b) / nonzero(root)[:, None]
    return (near, far) if wide else (far.T, near.T)
