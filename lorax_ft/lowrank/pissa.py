"""PiSSA: A and B start from the top singular triples of W, and the base becomes W − s A B (2404.02948).

W ≈ U_r S_r V_rᵀ,   A = U_r √(S_r / s),   B = √(S_r / s) V_rᵀ
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import multihost_utils
from threadpoolctl import threadpool_limits

OVERSAMPLING = 4


def pissa(w: Array, *, rank: int, iterations: int | None, keys: Array) -> tuple[Array, Array]:
    """The factors A √s and B √s of a stack of matrices: U_r √S_r and √S_r V_rᵀ.

    Args:
      w: `[L, I, O]`.
      rank: r.
      iterations: power iterations of the randomised SVD on the device; None: the exact SVD on the host.
      keys: `[L]`, for the randomised SVD.

    Returns:
      `[L, I, r]` and `[L, r, O]`, float32.

    Raises:
      ValueError: the exact SVD inside a JAX transformation.
    """
    if iterations is None:
        if isinstance(w, jax.core.Tracer):
            raise ValueError("the exact SVD runs on the host, outside jit and eval_shape; set adapter.pissa_iterations")
        a, b = exact(np.asarray(w), rank=rank) if w.is_fully_addressable else _shared_exact(w, rank=rank)
        return jnp.asarray(a), jnp.asarray(b)
    with threadpool_limits(1, user_api="blas"):  # LAPACK's, on a CPU
        return jax.block_until_ready(randomised(w, keys, rank=rank, iterations=iterations))


def exact(w: np.ndarray, *, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """By the eigenvectors of the short side's Gram matrix in float64: a third of an SVD's time, error 1e-14."""

    def factors(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import scipy.linalg

        m = np.asarray(matrix, np.float64)
        wide = m.shape[0] <= m.shape[1]
        short = m if wide else m.T  # [n, long]
        n = short.shape[0]
        values, vectors = scipy.linalg.eigh(short @ short.T, subset_by_index=[n - rank, n - 1])
        values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
        root = values**0.25  # √S, where the eigenvalues are S²
        near = vectors * root
        far = np.divide(
            (vectors.T @ short), root[:, None], out=np.zeros((rank, short.shape[1])), where=root[:, None] > 0
        )
        a, b = (near, far) if wide else (far.T, near.T)
        return a.astype(np.float32), b.astype(np.float32)

    # One BLAS thread a matrix: with more, OpenBLAS's threads wait for each other (numpy 2.4, up to 50 times slower).
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(factors, w))
    return np.stack([a for a, _ in parts]), np.stack([b for _, b in parts])


def _shared_exact(w: Array, *, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`exact` of an array on several hosts: each takes some of the matrices, and all get the same factors."""
    n, i = jax.process_count(), jax.process_index()
    whole = multihost_utils.process_allgather(w, tiled=True)
    padded = -(-len(whole) // n)  # every host hands over as many
    mine = np.minimum(np.arange(padded) * n + i, len(whole) - 1)
    parts = multihost_utils.process_allgather(exact(whole[mine], rank=rank))  # [n, padded, ...]
    a, b = (np.moveaxis(part, 0, 1).reshape(-1, *part.shape[2:])[: len(whole)] for part in parts)
    return a, b


@functools.partial(jax.jit, static_argnames=("rank", "iterations"))
def randomised(w: Array, keys: Array, *, rank: int, iterations: int) -> tuple[Array, Array]:
    """By a randomised SVD with power iterations (Halko et al., 0909.4061), float32 at the highest precision.

    The basis Q spans the short side; it is made orthonormal once an iteration, Q ← qr(M Mᵀ Q), and M ≈ Q Qᵀ M.
    """
    matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

    def factors(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        w, key = pair
        wide = w.shape[0] <= w.shape[1]
        m = (w if wide else w.T).astype(jnp.float32)  # [n, long]
        y = matmul(m, jax.random.normal(key, (m.shape[1], min(rank + OVERSAMPLING, m.shape[0]))))
        for _ in range(iterations):
            y = matmul(m, matmul(m.T, jnp.linalg.qr(y)[0]))
        q = jnp.linalg.qr(y)[0]
        b = matmul(q.T, m)
        squares, u = jnp.linalg.eigh(matmul(b, b.T))  # ascending
        u, root = u[:, ::-1][:, :rank], jnp.maximum(squares[::-1][:rank], 0) ** 0.25  # √S, where the squares are S²
        near, far = matmul(q, u) * root, matmul(u.T, b) / jnp.where(root > 0, root, 1)[:, None]
        return (near, far) if wide else (far.T, near.T)

    return lax.map(factors, (w, keys))
