"""The loss is an argument of the step, and rates are numbers in its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

import lorax_ft as lft
from lorax_ft.models.model import Model
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.step import TrainState, make_train_step
from lorax_ft.tree import Tree, combine, flatten, unflatten

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROWS, TOKENS, STEPS = 4, 8, 3


@pytest.fixture(scope="module")
def model(decoder: Callable[..., Model]) -> Model:
    return decoder(layers=2)


def batches(model: Model, count: int, *, microbatches: int = 1) -> list[dict[str, Array]]:
    """Batches `[M, B, T]` whose microbatches have different numbers of labels."""
    rng = np.random.default_rng(0)
    shape = (microbatches, ROWS // microbatches, TOKENS)
    found = []
    for _ in range(count):
        weights = (rng.random(shape) < 0.3 + 0.4 * np.arange(microbatches)[:, None, None]) * 1.0
        found.append(
            {
                "tokens": jnp.asarray(rng.integers(0, model.config.vocab_size, shape)),
                "targets": jnp.asarray(rng.integers(0, model.config.vocab_size, shape)),
                "weights": jnp.asarray(weights, jnp.float32),
                "positions": jnp.broadcast_to(jnp.arange(TOKENS), shape),
                "segment_ids": jnp.ones(shape, jnp.int32),
            }
        )
    return found


def adapted(model: Model, *, seed: int = 1, **options: Any) -> tuple[Tree, Tree]:
    config = lft.AdapterConfig(**{"rank": 4} | options)
    key = jax.random.key(seed)
    return lft.partition(lft.add_adapters(model.params, config, layout=model.layout, key=key))


def start(tx: optax.GradientTransformation, trained: Tree) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))


def contrastive(model: Model) -> Any:
    """InfoNCE over pairs of rows `[P, 2, T]`: each row's mean feature finds its partner's."""

    def loss(params: Tree, batch: Any, key: Array | None) -> tuple[Array, Array, dict[str, Array]]:
        pairs, _, tokens = batch["tokens"].shape
        features, _ = model.features(params, batch["tokens"].reshape(-1, tokens))
        mean = features.mean(axis=1).reshape(pairs, 2, -1)
        unit = mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
        scores = 5 * unit[:, 0] @ unit[:, 1].T
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(pairs))
        hits = jnp.sum(jnp.argmax(scores, axis=1) == jnp.arange(pairs))
        return losses.sum(), jnp.float32(pairs), {"accuracy": hits.astype(jnp.float32)}

    return loss


def test_a_contrastive_loss_over_pairs_trains(model: Model) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, model.config.vocab_size, (2, 6, 2, TOKENS))  # 2 microbatches
    tokens[:, :, 1, : TOKENS // 4] = tokens[:, :, 0, : TOKENS // 4]  # partners share a beginning
    batch = {"tokens": jnp.asarray(tokens)}
    trained, frozen = adapted(model)
    tx = make_optimizer(lft.OptimConfig(learning_rate=1e-2), steps=40)
    step = jax.jit(make_train_step(contrastive(model), tx, layout=model.layout))
    state, seen = start(tx, trained), []
    for _ in range(40):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        seen.append((float(metrics["loss"]), float(metrics["accuracy"])))
    assert metrics["weight"] == 12
    assert seen[-1][0] < 0.5 * seen[0][0]
    assert seen[-1][1] == 1 > seen[0][1]


def test_microbatches_weigh_by_their_own_weights(model: Model) -> None:
    """Loss, metrics and gradients are those of the whole batch, however unevenly it is cut."""
    supervised = lft.supervised_loss(model, packed=False)

    def with_metric(params: Tree, batch: Any, key: Any) -> Any:
        value, weight, _ = supervised(params, batch, key)
        return value, weight, {"halved": value / 2}

    trained, frozen = adapted(model, dora=True)
    tx = make_optimizer(lft.OptimConfig(), steps=1)
    step = jax.jit(make_train_step(with_metric, tx, layout=model.layout))
    (cut,) = batches(model, 1, microbatches=4)
    whole = {name: rows.reshape(1, ROWS, TOKENS) for name, rows in cut.items()}
    assert len(set(np.asarray(cut["weights"].sum(axis=(1, 2))).tolist())) > 1
    (one, apart), (other, together) = (
        step(start(tx, trained), frozen, batch, jax.random.key(0)) for batch in (cut, whole)
    )
    chex.assert_trees_all_close(apart, together, rtol=1e-5)
    chex.assert_trees_all_close(one.trained, other.trained, atol=1e-7)
    assert float(apart["halved"]) == pytest.approx(float(apart["loss"]) / 2)


def test_a_vmapped_step_is_so_many_solo_runs(model: Model) -> None:
    """K states of other rates, alphas and seeds, over one base that is not copied.

    Adam divides by √v + eps. With the usual eps its first updates are the signs of gradients, which
    rounding flips where a gradient is nearly 0.
    """
    rates, alphas = (1e-2, 3e-3, 1e-3), (4.0, 8.0, 16.0)
    loss = lft.supervised_loss(model, packed=False, dropout=0.1, neftune_alpha=5.0)
    data = batches(model, STEPS, microbatches=2)
    states, frozens, solo = [], [], []
    for i, (rate, alpha) in enumerate(zip(rates, alphas, strict=True)):
        options = lft.OptimConfig(learning_rate=rate, lora_plus_ratio=2.0 + i, eps=1e-3)
        tx = make_optimizer(options, steps=STEPS)
        trained, frozen = adapted(model, alpha=alpha, seed=i)
        states.append(start(tx, trained))
        frozens.append(frozen)
        state, step = states[-1], jax.jit(make_train_step(loss, tx, layout=model.layout))
        for batch in data:
            state, metrics = step(state, frozen, batch, jax.random.key(i))
        solo.append((state, metrics))

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    owned = []
    for state, frozen in zip(states, frozens, strict=True):
        adapters, _ = lft.partition(combine(state.trained, frozen), by="ownership")
        owned.append(flatten(adapters))
    shared = flatten(frozens[0])
    scales = {
        path: jnp.stack([flat[path] for flat in owned]) for path in owned[0] if path in shared
    }
    frozen = unflatten(shared | scales)
    axes = unflatten({path: 0 if path in scales else None for path in shared})
    # One program: of the optimizer's options, only the schedule's shape is part of it.
    tx = make_optimizer(lft.OptimConfig(learning_rate=1.0, eps=1e-3), steps=STEPS)
    step = make_train_step(loss, tx, layout=model.layout)
    vmapped = jax.jit(jax.vmap(step, in_axes=(0, axes, None, 0)))
    keys = jnp.stack([jax.random.key(i) for i in range(len(rates))])
    for batch in data:
        stacked, metrics = vmapped(stacked, frozen, batch, keys)
    for i, (state, last) in enumerate(solo):
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], (stacked.trained, metrics))
        chex.assert_trees_all_close(mine, (state.trained, last), rtol=1e-6, atol=1e-6)
    assert len(scales) > 0


def test_rates_are_found_and_set_by_name() -> None:
    trained = {"a": {"lora_a": jnp.ones(2), "lora_b": jnp.ones(2)}}
    config = lft.OptimConfig(
        optimizer="sgd",
        b1=0.0,
        learning_rate=0.1,
        lora_plus_ratio=4.0,
        clip_norm=0.0,
        schedule="constant",
        warmup_fraction=0.0,
    )
    tx = make_optimizer(config, steps=2)
    state = tx.init(trained)
    for rates in ((0.1, 0.4), (0.5, 0.5)):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, trained), state, trained)
        moved = [-float(updates["a"][name][0]) for name in ("lora_a", "lora_b")]
        assert moved == pytest.approx(rates)
        state = optax.tree.set(state, peak=jnp.float32(0.5))
