"""The chunked cross-entropy of the head equals the plain one."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lorax_ft.lowrank.linear import linear
from lorax_ft.lowrank.terms.magnitude import column_norm
from lorax_ft.models.parts import rows_dot_general
from lorax_ft.training.head_loss import head_loss
from lorax_ft.tree import Tree


def score(layer: dict[str, Array], features: Array) -> Array:
    return linear(layer, features, lambda x, kernel: rows_dot_general(x, kernel, None))


B, T, D, V, R = 2, 12, 8, 31, 3

pytestmark = pytest.mark.usefixtures("strict")


def problem(kind: str, dtype: Any = jnp.float32) -> tuple[Tree, Tree, Array, Array, Array]:
    """The head's trained and frozen leaves, features, targets and weights."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    layer = {"kernel": normal(D, V).astype(dtype), "lora_a": normal(D, R), "lora_b": normal(R, V)}
    layer |= {"lora_scale": jnp.float32(0.3), "lora_a0": normal(D, R), "lora_b0": normal(R, V)}
    layer |= {"start_scale": jnp.float32(0.3), "magnitude": 1 + 0.1 * normal(V)}
    names = {
        "frozen": ("kernel",),
        "whole": ("kernel",),
        "lora": ("kernel", "lora_a", "lora_b", "lora_scale"),
        "all": tuple(layer),
        "dropout": ("kernel", "lora_a", "lora_b", "lora_scale"),
    }[kind]
    layer = {name: layer[name] for name in names}
    if kind == "all":
        layer["norm"] = column_norm(layer)
    if kind == "dropout":
        layer |= {"dropout_key": jax.random.key(3), "dropout_rate": jnp.float32(0.4)}
    trained = {"lora_a", "lora_b", "magnitude"} | ({"kernel"} if kind == "whole" else set())
    features = normal(B, T, D).astype(dtype)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (B, T)) * rng.random((B, T)), jnp.float32)
    mine = {name: leaf for name, leaf in layer.items() if name in trained}
    return (
        mine,
        {name: leaf for name, leaf in layer.items() if name not in trained},
        features,
        targets,
        weights,
    )


def plain(layer: Tree, features: Array, targets: Array, weights: Array) -> Array:
    logits = score(layer, features).astype(jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * picked)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("chunk_rows", [1, 8, 10, 1000])
@pytest.mark.parametrize("kind", ["frozen", "whole", "lora", "all"])
def test_equals_plain_cross_entropy_and_its_gradients(kind: str, chunk_rows: int) -> None:
    trained, fixed, features, targets, weights = problem(kind)

    def fused(trained: Tree, features: Array) -> Array:
        return head_loss(
            fixed | trained, features, targets, weights, score=score, chunk_rows=chunk_rows
        )

    def want(trained: Tree, features: Array) -> Array:
        return plain(fixed | trained, features, targets, weights)

    np.testing.assert_allclose(
        jax.jit(fused)(trained, features), want(trained, features), rtol=1e-6
    )
    scaled = [
        jax.value_and_grad(lambda t, x, f=f: f(t, x) / 7, argnums=(0, 1)) for f in (fused, want)
    ]
    got, expected = jax.jit(scaled[0])(trained, features), scaled[1](trained, features)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tokens", [11, 12])  # a prime number of tokens has no divisor to cut by
def test_any_number_of_tokens(tokens: int) -> None:
    trained, fixed, features, targets, weights = problem("lora")
    x, t, w = features[:, :tokens], targets[:, :tokens], weights[:, :tokens]
    got = head_loss(fixed | trained, x, t, w, score=score, chunk_rows=6)
    np.testing.assert_allclose(got, plain(fixed | trained, x, t, w), rtol=1e-6)


def test_weights_of_zero_leave_tokens_out() -> None:
    trained, fixed, features, targets, _ = problem("lora")

    def loss(features: Array) -> Array:
        return head_loss(
            fixed | trained, features, targets, jnp.zeros((B, T)), score=score, chunk_rows=4
        )

    value, gradient = jax.value_and_grad(loss)(features)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("labels", range(T + 1))
def test_chunks_without_labels_are_skipped(labels: int) -> None:
    """Labeled tokens come first, wherever in a row they are."""
    trained, fixed, features, targets, _ = problem("lora")
    labeled = np.random.default_rng(labels).permuted(np.tile(np.arange(T) < labels, (B, 1)), axis=1)
    computed = []

    def counted(layer: dict[str, Array], x: Array) -> Array:
        jax.debug.callback(lambda: computed.append(x.shape))
        return score(layer, x)

    def loss(features: Array, score: Any) -> Array:
        weights = jnp.asarray(labeled, jnp.float32)
        return head_loss(fixed | trained, features, targets, weights, score=score, chunk_rows=8)

    value, gradient = jax.jit(jax.value_and_grad(functools.partial(loss, score=counted)))(features)
    jax.effects_barrier()
    assert computed == math.ceil(labels / 4) * [(B, 4, D)]
    np.testing.assert_allclose(
        value,
        plain(fixed | trained, features, targets, jnp.asarray(labeled, jnp.float32)),
        rtol=1e-6,
    )
    assert np.array_equal(gradient.any(axis=-1), labeled)


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_bfloat16_sums_gradients_over_chunks_in_float32(kind: str) -> None:
    trained, fixed, features, targets, weights = problem(kind, jnp.bfloat16)

    def gradient(chunk_rows: int) -> Tree:
        def loss(trained: Tree) -> Array:
            return head_loss(
                fixed | trained, features, targets, weights, score=score, chunk_rows=chunk_rows
            )

        return jax.grad(loss)(trained)

    one, many = gradient(1000), gradient(2)
    for name, leaf in one.items():
        assert many[name].dtype == leaf.dtype == trained[name].dtype
        np.testing.assert_allclose(
            np.float32(many[name]),
            np.float32(leaf),
            atol=0.02 * float(np.abs(np.float32(leaf)).max()),
        )


def test_a_head_with_dropout_has_a_gradient() -> None:
    trained, fixed, features, targets, weights = problem("dropout")

    def loss(trained: Tree) -> Array:
        return head_loss(fixed | trained, features, targets, weights, score=score, chunk_rows=8)

    gradient = jax.grad(loss)(trained)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in gradient.values())


def test_chunks_drop_differently() -> None:
    """Equal tokens in different chunks must get different dropout masks."""
    trained, fixed, _, _, _ = problem("dropout")
    x, t = jnp.ones((1, 8, D)), jnp.zeros((1, 8), jnp.int32)

    def loss_of(i: int) -> float:
        # All are labeled, so that each stays in its place.
        weights = jnp.full((1, 8), 1e-9).at[0, i].set(1)
        return float(head_loss(fixed | trained, x, t, weights, score=score, chunk_rows=1))

    assert len({round(loss_of(i), 4) for i in range(8)}) > 4


def test_the_logits_are_computed_once_and_never_whole() -> None:
    trained, fixed, features, targets, weights = problem("lora")

    def loss(trained: Tree, features: Array) -> Array:
        return head_loss(fixed | trained, features, targets, weights, score=score, chunk_rows=8)

    forward = str(jax.make_jaxpr(lambda t, x: loss(t, x))(trained, features))
    backward = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(trained, features))
    only_features = str(jax.make_jaxpr(jax.grad(loss, argnums=1))(trained, features))
    assert forward.count("dot_general[") == 3  # x W, x A, (x A) B
    assert only_features.count("dot_general[") == 6  # and each again for the gradient of x
    assert backward.count("dot_general[") == 8  # and one each for A and B, but none for W
    for text in (forward, backward, only_features):
        chunks, rows = 3, 4
        assert f"[{chunks},{B},{rows},{V}]" not in text
        assert f"[{B},{T},{V}]" not in text
        assert f"[{B * T},{V}]" not in text


def test_under_vmap_over_adapters_and_recomputation() -> None:
    trained, fixed, features, targets, weights = problem("lora")

    def loss(trained: Tree) -> Array:
        return head_loss(fixed | trained, features, targets, weights, score=score, chunk_rows=8)

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), trained)
    many = jax.vmap(jax.grad(jax.checkpoint(loss)))(stacked)
    for i, one in enumerate((trained, jax.tree.map(lambda leaf: 2 * leaf, trained))):
        for name, leaf in jax.grad(loss)(one).items():
            np.testing.assert_allclose(many[name][i], leaf, rtol=2e-5, atol=2e-6)
