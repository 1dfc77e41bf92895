"""The papers' claims about gradients, learning rates and frozen factors, one test per claim."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from method_cases import distance

from lorax_ft import (
    AdapterConfig,
    OptimConfig,
    add_adapters,
    combine,
    label,
    linear,
    make_optimizer,
    partition,
    with_norms,
)
from lorax_ft.lowrank.terms.magnitude import column_norm
from lorax_ft.tree import Tree, flatten

KEY = jax.random.key(11)

pytestmark = pytest.mark.usefixtures("strict")


def test_claim_5_the_first_gradients() -> None:
    """At B = 0: dA = 0 exactly, and dB = s · (x A)ᵀ dy."""
    rng = np.random.default_rng(0)
    layer = {
        "kernel": rng.normal(size=(6, 5)),
        "lora_a": rng.normal(size=(6, 2)),
        "lora_b": np.zeros((2, 5)),
    }
    layer = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in layer.items()} | {
        "lora_scale": jnp.float32(0.7)
    }
    x, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 6), (4, 5)))
    got = jax.grad(lambda la: jnp.sum(dy * linear(la, x, jnp.matmul)))(layer)
    np.testing.assert_array_equal(got["lora_a"], 0)
    np.testing.assert_allclose(got["lora_b"], 0.7 * (x @ layer["lora_a"]).T @ dy, rtol=1e-5)
    np.testing.assert_allclose(
        got["lora_b"], 0.7 * layer["lora_a"].T @ got["kernel"], rtol=1e-5, atol=1e-6
    )


def test_claim_6_detaching_doras_norm_leaves_the_magnitudes_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Detaching the norm changes dA and dB, but not dm (2402.09353, section 4.3)."""
    rng = np.random.default_rng(1)
    shapes = {"kernel": (6, 5), "lora_a": (6, 2), "lora_b": (2, 5), "magnitude": (5,)}
    layer = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    layer |= {"lora_scale": jnp.float32(0.7)}
    x, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 6), (4, 5)))

    def gradient(*, detached: bool) -> Tree:
        def loss(layer: Tree) -> Array:
            whole = layer["kernel"] + layer["lora_scale"] * layer["lora_a"] @ layer["lora_b"]
            norm = column_norm(layer) if detached else jnp.linalg.norm(whole, axis=0)
            return jnp.sum(dy * linear(layer | {"norm": norm}, x, jnp.matmul))

        return jax.grad(loss)(layer)

    detached, attached = gradient(detached=True), gradient(detached=False)
    np.testing.assert_allclose(detached["magnitude"], attached["magnitude"], rtol=1e-5, atol=1e-6)
    assert distance(detached["lora_a"], attached["lora_a"]) > 0.01
    assert not jax.grad(lambda la: jnp.sum(column_norm(la)))(layer)["lora_b"].any()


def test_the_norm_is_computed_from_the_adapters_alone_and_never_stored(
    zoo: Any, randomize: Any
) -> None:
    """Once per step, outside the microbatches: it depends on no batch and gets no gradient."""
    case = zoo("decoder")
    params = randomize(
        add_adapters(case.params, AdapterConfig(rank=2, dora=True), layout=case.layout, key=KEY)
    )
    trained, frozen = partition(params)

    def loss(trained: Tree, norms: bool) -> Array:
        whole = combine(trained, frozen)
        whole = with_norms(whole, layout=case.layout) if norms else whole
        return jnp.sum(jnp.sin(case.apply({"params": whole}, *case.example)))

    outside, inside = (
        flatten(jax.jit(jax.grad(loss), static_argnums=1)(trained, norms))
        for norms in (True, False)
    )
    for path in outside:
        assert distance(outside[path], inside[path]) < 1e-5, path


def test_lora_fa_is_lora_without_a(zoo: Any) -> None:
    """B's first update is bitwise LoRA's; A stays, without gradient or moments (2308.03303)."""
    case = zoo("decoder")
    params = add_adapters(case.params, AdapterConfig(rank=4), layout=case.layout, key=KEY)
    tx = make_optimizer(OptimConfig(learning_rate=1e-3, clip_norm=0), steps=3)

    def first(freeze: tuple[str, ...]) -> tuple[dict[str, Array], Any]:
        trained, frozen = partition(params, freeze=freeze)

        def loss(trained: Tree) -> Array:
            y = case.apply({"params": combine(trained, frozen)}, *case.example)
            return jnp.sum(jnp.sin(y))

        with jax.numpy_dtype_promotion("standard"):  # optax adds an int32 count to a float (0.2.8)
            updates, state = jax.jit(tx.update)(
                jax.jit(jax.grad(loss))(trained), tx.init(trained), trained
            )
        return flatten(updates), state

    (both, full), (alone, half) = first(()), first(("lora_a",))
    assert {path.rpartition("/")[2] for path in alone} == {"lora_b"}
    for path, update in alone.items():
        np.testing.assert_array_equal(update, both[path])
        assert update.any()
    floats = [
        sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) for state in (full, half)
    ]
    a, b = (
        sum(leaf.size for path, leaf in flatten(params).items() if path.endswith(name))
        for name in ("_a", "_b")
    )
    assert floats == [2 * (a + b), 2 * b]
    owned, _ = partition(params, by="ownership", freeze=("lora_a",))
    assert {path.rpartition("/")[2] for path in flatten(owned)} == {
        "lora_a",
        "lora_b",
        "lora_scale",
    }


def test_lora_fa_keeps_no_input_for_the_backward_pass() -> None:
    """dB needs only x A, of rank r; dA would need x (2308.03303, section 3)."""
    layer = {"kernel": jnp.ones((64, 48)), "lora_a": jnp.ones((64, 2)), "lora_b": jnp.ones((2, 48))}
    layer |= {"lora_scale": jnp.float32(1)}

    def kept(*names: str) -> list[tuple[int, ...]]:
        """The shapes of the residuals that depend on x."""
        trained = {name: layer[name] for name in names}
        frozen = {name: leaf for name, leaf in layer.items() if name not in names}
        _, backward = jax.vjp(
            lambda t, x: linear(frozen | t, x, jnp.matmul), trained, jnp.ones((100, 64))
        )
        return [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.shape[:1] == (100,)]

    assert kept("lora_a", "lora_b").count((100, 64)) == 1
    assert kept("lora_b") == [(100, 2)]


def test_claim_9_lora_plus(zoo: Any) -> None:
    """λ = 1 is bitwise LoRA; Adam's first update of B is λ times LoRA's (2402.12354)."""
    case = zoo("decoder")
    params = add_adapters(case.params, AdapterConfig(rank=2), layout=case.layout, key=KEY)
    trained, frozen = partition(params)

    @jax.jit
    def gradient(trained: Tree) -> Tree:
        return jax.grad(
            lambda t: jnp.sum(case.apply({"params": combine(t, frozen)}, *case.example) ** 2)
        )(trained)

    def trajectory(tx: optax.GradientTransformation, steps: int) -> Tree:
        now, state, update = trained, tx.init(trained), jax.jit(tx.update)
        with jax.numpy_dtype_promotion("standard"):  # optax adds an int32 count to a float (0.2.8)
            for _ in range(steps):
                updates, state = update(gradient(now), state, now)
                now = optax.apply_updates(now, updates)
        return flatten(now)

    def lora_plus(ratio: float) -> optax.GradientTransformation:
        flat = {
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "clip_norm": 0.0,
        }
        return make_optimizer(OptimConfig(**flat, lora_plus_ratio=ratio), steps=10)

    plain, one = trajectory(optax.adamw(1e-3, weight_decay=0), 3), trajectory(lora_plus(1.0), 3)
    for path, leaf in plain.items():
        np.testing.assert_array_equal(leaf, one[path])
        assert not np.array_equal(leaf, flatten(trained)[path])
    first, sixteen = trajectory(lora_plus(1.0), 1), trajectory(lora_plus(16.0), 1)
    for path, leaf in first.items():
        if path.endswith("lora_b"):  # B starts at 0, so its value is its update
            np.testing.assert_allclose(sixteen[path], 16 * leaf, rtol=1e-6)
            assert leaf.any()


def test_claim_10_what_rates_and_scales_have_in_common() -> None:
    """alpha / (p q), A and its rate times p, B's rate times q: the same run (Adam, eps 0)."""
    p, q = 3.0, 0.25
    rng = np.random.default_rng(3)
    kernel, start, x, y = (rng.normal(size=shape) for shape in ((6, 5), (6, 2), (8, 6), (8, 5)))

    def losses(alpha: float, *, p: float, q: float) -> list[float]:
        fixed = {"kernel": jnp.asarray(kernel), "lora_scale": jnp.asarray(alpha / 2)}
        layer = {"lora_a": p * jnp.asarray(start), "lora_b": jnp.zeros((2, 5))}
        groups = {"lora_a": optax.adam(0.01 * p, eps=0), "lora_b": optax.adam(0.01 * q, eps=0)}
        tx = optax.multi_transform(groups, label(layer))

        @jax.jit
        def step(layer: Tree, state: Any, t: Array) -> tuple[Tree, Any, Array]:
            def loss(layer: Tree) -> Array:
                return jnp.mean(
                    (linear(fixed | layer, jnp.asarray(x), jnp.matmul) - jnp.asarray(y)) ** 2
                )

            value, g = jax.value_and_grad(loss)(layer)
            # A's first gradient is exactly 0, and Adam without eps divides 0 by 0
            g = jax.tree.map(lambda d: jnp.where((t == 0) & (d == 0), 1e-30, d), g)
            updates, state = tx.update(g, state)
            updates["lora_a"] = jnp.where(t == 0, 0, updates["lora_a"])
            return optax.apply_updates(layer, updates), state, value

        state, values = tx.init(layer), []
        for t in range(20):
            layer, state, value = step(layer, state, jnp.asarray(t))
            values.append(float(value))
        return values

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        one, other = losses(4.0, p=1, q=1), losses(4.0 / (p * q), p=p, q=q)
    assert one[-1] < 0.9 * one[0]
    np.testing.assert_allclose(one, other, rtol=1e-10)
