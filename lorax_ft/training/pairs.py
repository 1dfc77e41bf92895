"""Optimizers that see the pair (A, B) as its product A B, as optax transformations.

The same product has many pairs, A G and G⁻¹ B for any invertible G, and Adam moves each to another
product. These move all of them to the same one.

Letters: L matrices of the stack, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.terms.low_rank import A, B
from lorax_ft.tree import Layer, Tree, from_modules, modules


class Pair(NamedTuple):
    """A and B of the matrices of a stack, or what belongs to them."""

    a: Array
    """`[L, I, R]`."""
    b: Array
    """`[L, R, O]`."""


class MuonState(NamedTuple):
    """The state of `scale_by_lora_muon`."""

    moments: Tree
    """The means of the gradients of A and B."""


def precondition_pairs(damping: float = 1e-6) -> optax.GradientTransformation:
    """Riemannian preconditioning (2402.02347): gradients by the metric of the product A B.

        ∇A (B Bᵀ + δ I)⁻¹,    (Aᵀ A + δ I)⁻¹ ∇B

    With plain gradient descent behind it, the paths of A G and G⁻¹ B have the same products (up to
    δ), and the rate of convergence does not depend on the condition number of A B.

    Args:
      damping: δ. B is 0 at the first step.

    Returns:
      A transformation of trees with A and B of a module side by side; other leaves stay. Its init
      raises ValueError where a module has one of the two, or none has both.
    """

    def inverse(gram: Array) -> Array:
        root = _inverse_root(gram + damping * jnp.eye(gram.shape[-1], dtype=gram.dtype))
        return highest_matmul(root, root)

    def precondition(gradients: Pair, factors: Pair) -> Pair:
        return Pair(
            highest_matmul(gradients.a, inverse(highest_matmul(factors.b, factors.b.mT))),
            highest_matmul(inverse(highest_matmul(factors.a.mT, factors.a)), gradients.b),
        )

    def update(updates: Tree, state: optax.EmptyState, params: Tree | None = None) -> Any:
        return _map_pairs(precondition, updates, _given(params)), state

    def init(params: Tree) -> optax.EmptyState:
        _check(params)
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)


def scale_by_lora_muon(b1: float = 0.9) -> optax.GradientTransformation:
    """LoRA-Muon (2606.12921): the steepest descent of A B in the spectral norm.

        R_A = (Aᵀ A)^-½,   R_B = (B Bᵀ)^-½
        ½ sign(M_A R_B) R_B,    ½ R_A sign(R_A M_B),    sign(U S Vᵀ) = U Vᵀ

    M are means of the gradients. A step of rate η changes each of the two parts of A B, ΔA B and
    A ΔB, by η / 2 in every direction that it has. While B is 0, only B moves.

    The signs are computed from Gram matrices of R × R, by products alone.

    Args:
      b1: decay rate of the mean.

    Returns:
      A transformation of trees with A and B of a module side by side; other leaves stay. Behind it
      comes the learning rate. Its init raises ValueError where a module has one of the two, or none
      has both.
    """

    def direction(means: Pair, factors: Pair) -> Pair:
        root_a = _inverse_root(highest_matmul(factors.a.mT, factors.a))
        root_b = _inverse_root(highest_matmul(factors.b, factors.b.mT))
        whitened_a = highest_matmul(means.a, root_b)  # [L, I, R]
        whitened_b = highest_matmul(root_a, means.b)  # [L, R, O]
        sign_a = highest_matmul(
            whitened_a, _inverse_root(highest_matmul(whitened_a.mT, whitened_a))
        )
        sign_b = highest_matmul(
            _inverse_root(highest_matmul(whitened_b, whitened_b.mT)), whitened_b
        )
        return Pair(highest_matmul(sign_a, root_b) / 2, highest_matmul(root_a, sign_b) / 2)

    def init(params: Tree) -> MuonState:
        _check(params)
        return MuonState(from_modules(jax.tree.map(jnp.zeros_like, _pairs_of(params))))

    def update(updates: Tree, state: MuonState, params: Tree | None = None) -> Any:
        def mean(old: Array, gradient: Array) -> Array:
            return b1 * old + (1 - b1) * gradient

        gradients = from_modules(_pairs_of(updates))
        means = jax.tree.map(mean, state.moments, gradients)
        directions = _pairs_of(_map_pairs(direction, means, _given(params)))
        layers = modules(updates)
        for path, pair in directions.items():
            layers[path] = layers[path] | pair
        return from_modules(layers), MuonState(means)

    return optax.GradientTransformation(init, update)


def _check(params: Tree) -> None:
    """Raise where one of the two factors does not train, or there are none."""
    layers = modules(params)
    for path, layer in layers.items():
        if (A in layer) != (B in layer):
            raise ValueError(
                f"optim.optimizer lora_muon and optim.riemannian need both factors to train, and "
                f"{path} has one; leave out adapter.freeze, or take another optimizer"
            )
    if not _pairs_of(params):
        raise ValueError(
            "optim.optimizer lora_muon and optim.riemannian are for LoRA's A and B, and none "
            "trains here; take another optimizer"
        )


def _given(params: Tree | None) -> Tree:
    if params is None:
        raise ValueError("the update of A depends on B: give the optimizer's update the params")
    return params


def _pairs_of(tree: Tree) -> dict[str, Layer]:
    """A and B of the modules that have both, by path."""
    pairs = {}
    for path, layer in modules(tree).items():
        if A in layer and B in layer:
            pairs[path] = {A: layer[A], B: layer[B]}
    return pairs


def _map_pairs(f: Callable[[Pair, Pair], Pair], tree: Tree, params: Tree) -> Tree:
    """The tree with f(its pair, the pair of the parameters) in place of each pair."""
    layers = modules(tree)
    factors = _pairs_of(params)
    for path, pair in _pairs_of(tree).items():
        mapped = f(_matrices(pair), _matrices(factors[path]))
        changed = {}
        for name, leaf in zip((A, B), mapped, strict=True):
            changed[name] = leaf.reshape(pair[name].shape)
        layers[path] = layers[path] | changed
    return from_modules(layers)


def _matrices(pair: Layer) -> Pair:
    """A `[*L, *I, R]` and B `[*L, R, *O]` with one axis each for stack, in and out."""
    a, b = pair[A], pair[B]
    rank = a.shape[-1]
    # B has its rank behind the stack axes, which it shares with A. If two axes could be it, the
    # last is: stacks are common, and matrices with several axes of R outputs are not.
    n_stack = max(
        n
        for n in range(min(a.ndim, b.ndim) - 1)
        if b.shape[n] == rank and a.shape[:n] == b.shape[:n]
    )
    stack = math.prod(a.shape[:n_stack])
    return Pair(a.reshape(stack, -1, rank), b.reshape(stack, rank, -1))


def _inverse_root(gram: Array) -> Array:
    """G^-½ of positive semidefinite matrices `[L, R, R]`, and 0 where G is 0.

    By Newton's coupled iteration (Higham, Functions of Matrices, 2008, 6.35), Y → G^½ and
    Z → G^-½, which is products alone: `eigh` calls LAPACK, whose calls deadlock when a program on
    two cores runs several at once (jaxlib 0.10.2), and is slow on accelerators. Eigenvalues are
    raised by the rounding of the largest.
    """
    rank = gram.shape[-1]
    rounding = 8 * float(jnp.finfo(gram.dtype).eps)
    # An eigenvalue grows by up to 1.5² in an iteration; the last ones square the error.
    iterations = math.ceil(math.log(1 / rounding, 1.5**2)) + 8
    one = jnp.eye(rank, dtype=gram.dtype)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    scale = jnp.where(trace > 0, trace, 1)

    def iterate(_: int, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        y, z = pair
        t = (3 * one - highest_matmul(z, y)) / 2
        return highest_matmul(y, t), highest_matmul(t, z)

    start = (gram / scale + rounding * one, jnp.broadcast_to(one, gram.shape))
    _, root = lax.fori_loop(0, iterations, iterate, start)
    return jnp.where(trace > 0, root * lax.rsqrt(scale), 0)
