"""Optimizers of the product A B: LoRA-Muon and Riemannian preconditioning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_ft as lft
from lorax_ft.models.model import Model
from lorax_ft.training.pairs import precondition_pairs, scale_by_lora_muon
from lorax_ft.tree import Tree

I, R, O = 9, 3, 7


@pytest.fixture(autouse=True)
def double(request: pytest.FixtureRequest) -> Iterator[None]:
    if "model" in request.fixturenames:
        yield
        return
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def pair(seed: int = 0, *stack: int) -> Tree:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(*stack, I, R)), rng.normal(size=(*stack, R, O))
    return {"m": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}


def product(params: Tree) -> jax.Array:
    return params["m"]["lora_a"] @ params["m"]["lora_b"]


def path(tx: optax.GradientTransformation, params: Tree, target: Any, steps: int) -> list[Any]:
    """The products A B after each step towards a target."""

    def loss(params: Tree) -> jax.Array:
        return jnp.sum((product(params) - target) ** 2) / 2

    state = tx.init(params)
    products = []
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        products.append(product(params))
    return products


def muon(rate: float) -> optax.GradientTransformation:
    return optax.chain(scale_by_lora_muon(), optax.scale(-rate))


def riemannian(rate: float) -> optax.GradientTransformation:
    return optax.chain(precondition_pairs(damping=0), optax.scale(-rate))


@pytest.mark.parametrize(
    ("make", "equal"),
    [(muon, True), (riemannian, True), (optax.sgd, False), (optax.adam, False)],
)
def test_equal_products_stay_equal(make: Callable[[float], Any], equal: bool) -> None:
    """A G and G⁻¹ B take the path of A and B; gradient descent and Adam leave it."""
    params, target = pair(0), product(pair(1))
    g = np.random.default_rng(2).normal(size=(R, R)) + 2 * np.eye(R)
    layer = params["m"]
    others = {"m": {"lora_a": layer["lora_a"] @ g, "lora_b": jnp.linalg.solve(g, layer["lora_b"])}}
    one, other = (path(make(0.02), p, target, 5) for p in (params, others))
    difference = max(float(jnp.abs(x - y).max()) for x, y in zip(one, other, strict=True))
    assert (difference < 1e-9) == equal
    assert equal or difference > 1e-3


def test_a_step_of_muon_changes_each_part_by_half_the_rate() -> None:
    """In every direction: all singular values of ΔA B and of A ΔB are η / 2."""
    params = pair(0)
    gradients = pair(1)
    tx = muon(0.1)
    updates, _ = tx.update(gradients, tx.init(params), params)
    for change in (
        updates["m"]["lora_a"] @ params["m"]["lora_b"],
        params["m"]["lora_a"] @ updates["m"]["lora_b"],
    ):
        values = jnp.linalg.svd(change, compute_uv=False)
        np.testing.assert_allclose(values[:R], 0.05, rtol=1e-9)
        assert values[R:].max() < 1e-12


def test_a_step_of_muon_is_the_steepest() -> None:
    """Of all changes ΔA B of spectral norm η / 2, none lowers <∇, ΔA B> more."""
    params, gradients = pair(0), pair(1)
    tx = muon(0.1)
    updates, _ = tx.update(gradients, tx.init(params), params)
    slope = float(jnp.sum(gradients["m"]["lora_a"] * updates["m"]["lora_a"]))
    for seed in range(200):
        change = np.random.default_rng(seed).normal(size=(I, R))
        norm = np.linalg.norm(change @ params["m"]["lora_b"], 2)
        change = change * 0.05 / norm
        assert float(jnp.sum(gradients["m"]["lora_a"] * change)) > slope


def test_b_moves_first() -> None:
    params = pair(0)
    params["m"]["lora_b"] = jnp.zeros((R, O))
    for make in (muon, lambda rate: optax.chain(precondition_pairs(), optax.scale(-rate))):
        tx = make(0.1)
        gradients = {"m": {"lora_a": jnp.zeros((I, R)), "lora_b": pair(1)["m"]["lora_b"]}}
        updates, _ = tx.update(gradients, tx.init(params), params)
        assert not updates["m"]["lora_a"].any()
        assert jnp.all(jnp.isfinite(updates["m"]["lora_b"]))
        assert updates["m"]["lora_b"].any()


@pytest.mark.parametrize("make", [scale_by_lora_muon, precondition_pairs])
def test_a_stack_is_its_matrices(make: Callable[[], Any]) -> None:
    """Stacks of as many layers as the rank, too, and ranks that are padded with zeros."""
    params, gradients = pair(0, R), pair(1, R)
    padded = jax.tree.map(lambda leaf: leaf, params)
    padded["m"] = {
        "lora_a": params["m"]["lora_a"].at[1, :, 2].set(0),
        "lora_b": params["m"]["lora_b"].at[1, 2].set(0),
    }
    tx = make()
    updates, _ = tx.update(gradients, tx.init(padded), padded)
    for i in range(R):
        one = {"m": {name: leaf[i] for name, leaf in padded["m"].items()}}
        own = {"m": {name: leaf[i] for name, leaf in gradients["m"].items()}}
        expected, _ = tx.update(own, tx.init(one), one)
        for name, leaf in expected["m"].items():
            np.testing.assert_allclose(updates["m"][name][i], leaf, rtol=1e-9, atol=1e-12)


def test_kernels_of_several_axes() -> None:
    params, gradients = pair(0, 2), pair(1, 2)

    def several(tree: Tree) -> Tree:
        a, b = tree["m"]["lora_a"], tree["m"]["lora_b"]
        return {"m": {"lora_a": a.reshape(2, 3, 3, R), "lora_b": b[..., :6].reshape(2, R, 2, 3)}}

    def one(tree: Tree) -> Tree:
        return {"m": {"lora_a": tree["m"]["lora_a"], "lora_b": tree["m"]["lora_b"][..., :6]}}

    tx = scale_by_lora_muon()
    got, _ = tx.update(several(gradients), tx.init(several(params)), several(params))
    want, _ = tx.update(one(gradients), tx.init(one(params)), one(params))
    for name, leaf in want["m"].items():
        np.testing.assert_array_equal(got["m"][name].reshape(leaf.shape), leaf)


def test_the_condition_number_does_not_matter() -> None:
    """The claim of 2402.02347: as fast to an ill-conditioned product as to a good one."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(I, R)))
    right, _ = np.linalg.qr(rng.normal(size=(O, R)))

    def error(condition: float, tx: optax.GradientTransformation) -> float:
        target = left @ np.diag(np.geomspace(1, 1 / condition, R)) @ right.T
        noise = pair(3)["m"]
        root = np.diag(np.sqrt(np.geomspace(1, 1 / condition, R)))
        start = {
            "m": {
                "lora_a": jnp.asarray(left @ root + 0.02 * np.asarray(noise["lora_a"])),
                "lora_b": jnp.asarray(root @ right.T),
            }
        }
        return float(jnp.linalg.norm(path(tx, start, target, 60)[-1] - target))

    assert error(100, riemannian(0.3)) < 1e-6
    assert error(100, optax.sgd(0.3)) > 1e-3


@pytest.mark.parametrize("optim", [{"optimizer": "lora_muon"}, {"riemannian": True}])
def test_what_has_no_pair_is_refused(optim: dict[str, Any], model: Model) -> None:
    tx = lft.make_optimizer(lft.OptimConfig(**optim), steps=2)

    def init(**fields: Any) -> None:
        config = lft.AdapterConfig(rank=2, **fields)
        params = lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(0))
        trained, _ = lft.partition(params, whole=config.train_whole, freeze=config.freeze)
        tx.init(trained)

    with pytest.raises(ValueError, match=r"need both factors to train, and layers/.* has one"):
        init(freeze=("lora_a",))
    with pytest.raises(ValueError, match="are for LoRA's A and B, and none trains here"):
        init(targets=(), train_whole=("up_proj",))
    init(dora=True)
    with pytest.raises(ValueError, match="both precondition"):
        lft.OptimConfig(optimizer="lora_muon", riemannian=True)
