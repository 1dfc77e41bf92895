"""The parts of the training step: optimizer groups, schedules, noise, packing, the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_ft as lft
from lorax_ft.data.chat import Sample
from lorax_ft.data.packing import collate
from lorax_ft.models.model import Model
from lorax_ft.training import contract
from lorax_ft.training.losses import batch_loss, neftune, supervised_loss
from lorax_ft.training.optimizer import make_optimizer, unit_schedule
from lorax_ft.training.step import TrainState, make_train_step
from lorax_ft.tree import Tree, combine, flatten

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def model(decoder: Callable[..., Model]) -> Model:
    return decoder()


def adapted(model: Model, **options: Any) -> tuple[Tree, Tree]:
    config = lft.AdapterConfig(**{"rank": 4, "alpha": 8} | options)
    return lft.partition(
        lft.add_adapters(model.params, config, layout=model.layout, key=jax.random.key(1))
    )


def some_batch(rows: int, length: int = 12, *, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(rows):
        n = int(rng.integers(4, length + 1))
        samples.append(
            [Sample(tokens=rng.integers(0, 97, n).astype(np.int32), mask=rng.random(n) < 0.7)]
        )
    return collate(samples, length)


def run(model: Model, steps: int, **options: Any) -> tuple[TrainState, list[float]]:
    optim = lft.OptimConfig(**{"learning_rate": 1e-2} | options)
    trained, frozen = adapted(model)
    tx = make_optimizer(optim, steps=steps)
    step = jax.jit(make_train_step(supervised_loss(model, packed=False), tx, layout=model.layout))
    state, losses = TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained)), []
    for i in range(steps):
        batch = {k: v[None] for k, v in some_batch(4, seed=i).items()}
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_lora_plus_with_ratio_one_is_lora_and_with_ratio_16_moves_b_16_times_as_far(
    model: Model,
) -> None:
    start, _ = adapted(model)
    moves = {}
    for ratio in (1.0, 16.0):
        state, _ = run(model, 1, lora_plus_ratio=ratio, eps=0.0, clip_norm=0.0)
        moves[ratio] = {
            path: np.asarray(leaf - flatten(start)[path])
            for path, leaf in flatten(state.trained).items()
        }
    for path, move in moves[1.0].items():
        np.testing.assert_allclose(
            moves[16.0][path], move * (16 if path.endswith("lora_b") else 1), rtol=1e-5, atol=1e-9
        )
    plain, same = run(model, 2)[0], run(model, 2, lora_plus_ratio=1.0)[0]
    jax.tree.map(np.testing.assert_array_equal, plain.trained, same.trained)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["adamw", "adam", "nadamw", "lion", "sgd"])
def test_every_optimizer_lowers_the_loss(name: str, model: Model) -> None:
    rate = {"sgd": 0.5, "lion": 3e-3}.get(name, 2e-2)
    optim = lft.OptimConfig(
        optimizer=name,
        learning_rate=rate,
        schedule="constant",
        weight_decay=0.01 * (name != "adam"),
    )  # type: ignore[arg-type]
    trained, frozen = adapted(model)
    tx = make_optimizer(optim, steps=8)
    step = jax.jit(make_train_step(supervised_loss(model, packed=False), tx, layout=model.layout))
    state = TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
    batch = {k: v[None] for k, v in some_batch(4).items()}
    losses = []
    for _ in range(8):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.02


def test_schedules_rise_to_the_peak_and_fall_as_they_are_named() -> None:
    def rates(name: str, **options: Any) -> np.ndarray:
        config = lft.OptimConfig(schedule=name, learning_rate=1.0, warmup_fraction=0.1, **options)  # type: ignore[arg-type]
        return np.array([unit_schedule(config, steps=100)(i) for i in range(101)])

    for name in ("cosine", "linear", "constant", "wsd"):
        np.testing.assert_allclose(rates(name)[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert rates("cosine")[55] == pytest.approx(0.5)
    assert rates("linear", final_fraction=0.2)[100] == pytest.approx(0.2)
    assert (rates("constant")[10:] == 1).all()
    assert (rates("wsd")[10:82] == 1).all()
    assert rates("wsd")[91] == pytest.approx(0.5)
    assert rates("wsd")[100] == pytest.approx(0)
    # Steps of warm-up replace the fraction, and leave at least one step.
    in_steps = rates("constant", warmup_steps=4)
    np.testing.assert_allclose(in_steps[:5], [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)
    assert (rates("constant", warmup_steps=0) == 1).all()
    assert rates("linear", warmup_steps=500)[98] == pytest.approx(1, abs=0.02)
    single = unit_schedule(lft.OptimConfig(learning_rate=1.0), steps=1)
    assert float(single(0)) == 1


def test_weight_decay_leaves_magnitudes_and_vectors_alone() -> None:
    trained = {
        "a": {"lora_a": jnp.ones((2, 2)), "lora_b": jnp.ones((2, 2)), "magnitude": jnp.ones(2)}
    }
    trained |= {"b": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    config = lft.OptimConfig(
        learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup_fraction=0
    )
    tx = make_optimizer(config, steps=2)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, trained), tx.init(trained), trained)
    moved = {path: float(jnp.abs(leaf).sum()) > 0 for path, leaf in flatten(updates).items()}
    assert moved == {
        "a/lora_a": True,
        "a/lora_b": True,
        "a/magnitude": False,
        "b/kernel": True,
        "b/bias": False,
    }


def test_the_global_norm_is_clipped_over_all_groups_at_once() -> None:
    trained = {"a": {"lora_a": jnp.zeros(3), "lora_b": jnp.zeros(4)}}
    config = lft.OptimConfig(
        optimizer="sgd", b1=0.0, learning_rate=1.0, schedule="constant", clip_norm=1.0
    )
    tx = make_optimizer(config, steps=1)
    updates, _ = tx.update(jax.tree.map(lambda x: x + 10, trained), tx.init(trained), trained)
    assert float(optax.tree.norm(updates)) == pytest.approx(1)


def test_neftune_noise_is_uniform_has_its_norm_by_true_lengths_and_spares_padding() -> None:
    segments = jnp.asarray(np.array([[1] * 100 + [2] * 300 + [0] * 112, [1] * 512], np.int32))
    width, alpha = 256, 5.0
    noise = np.asarray(neftune(jax.random.key(0), segments, alpha=alpha, width=width))
    assert (noise[0, 400:] == 0).all()
    for row, part, length in (
        (0, slice(0, 100), 100),
        (0, slice(100, 400), 300),
        (1, slice(0, 512), 512),
    ):
        piece = noise[row, part]
        assert np.abs(piece).max() <= alpha / np.sqrt(length * width)
        assert np.linalg.norm(piece) == pytest.approx(alpha / np.sqrt(3), rel=0.01)


def test_packed_loss_equals_unpacked_loss(model: Model) -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample(tokens=rng.integers(0, 97, n).astype(np.int32), mask=rng.random(n) < 0.8)
        for n in (5, 7, 9, 3)
    ]
    apart, together = collate([[s] for s in samples], 24), collate([samples[:3], samples[3:]], 24)
    loose = jax.jit(lambda b: batch_loss(model, model.params, b, packed=False))(apart)
    packed = jax.jit(lambda b: batch_loss(model, model.params, b, packed=True))(together)
    leaking = jax.jit(lambda b: batch_loss(model, model.params, b, packed=False))(together)
    assert float(packed) == pytest.approx(float(loose), rel=1e-5)
    assert abs(float(leaking) - float(loose)) > 1e-3


@pytest.mark.sampled(2)
def test_frozen_leaves_are_bitwise_the_same_and_every_trained_leaf_moves(model: Model) -> None:
    trained, frozen = adapted(model, dora=True, init="pissa")
    kept = jax.tree.map(np.array, frozen)
    tx = make_optimizer(lft.OptimConfig(), steps=3)
    step = jax.jit(
        make_train_step(supervised_loss(model, packed=False), tx, layout=model.layout),
        donate_argnums=0,
    )
    before = jax.tree.map(np.array, trained)
    state = TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
    for i in range(3):
        batch = {k: v[None] for k, v in some_batch(4, seed=i).items()}
        state, _ = step(state, frozen, batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)
    contract.check_moved(
        jax.device_get(contract.moved(before, state.trained, rate=1e-4)), updates=3
    )


def test_a_layer_that_the_loss_never_reads_is_an_error(model: Model) -> None:
    trained, frozen = adapted(model)

    def loss(trained: Tree, *, seen: bool) -> jax.Array:
        params = combine(trained, frozen)
        features = model.features if seen else lambda p, t: model.module.apply({"params": p}, t)
        return features(params, jnp.ones((1, 4), jnp.int32))[0].sum()

    contract.check_read(lambda t: loss(t, seen=True), trained)
    with pytest.raises(
        ValueError, match=r"the loss never reads layers/mlp/down_proj/lora_a.*and 10 more"
    ):
        contract.check_read(lambda t: loss(t, seen=False), trained)


def test_a_call_that_interception_cannot_see_is_an_error() -> None:
    class Sneaky(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Dense(3, name="seen")(x)
            kernel = self.param("kernel", nn.initializers.ones, (3, 3))
            return x @ kernel

    sneaky, x = Sneaky(), jnp.ones((2, 3))
    params = sneaky.init(jax.random.key(0), x)["params"]
    layout = lft.layout(sneaky.apply, params, x)
    assert list(layout) == ["seen"]
    trained, frozen = lft.partition(
        lft.add_adapters(params, lft.AdapterConfig(rank=2), layout=layout, key=jax.random.key(0))
    )
    jitted = jax.jit(sneaky.apply)  # jitted outside adapt, so interception never happens
    jitted({"params": combine(trained, frozen)}, x)
    with pytest.raises(ValueError, match="never reads seen/lora_a"):
        contract.check_read(
            lambda t: lft.adapt(jitted)({"params": combine(t, frozen)}, x).sum(), trained
        )


def test_scales_of_zero_and_leaves_that_stay_are_errors(model: Model) -> None:
    trained, frozen = adapted(model)
    still = jax.device_get(contract.moved(trained, trained, rate=1e-4))
    with pytest.raises(ValueError, match=r"after update 1, layers/mlp/down_proj.* did not move"):
        contract.check_moved(still, updates=1)
    # Too small to change A in float32.
    lost = jax.device_get(contract.moved(trained, trained, rate=1e-12))
    assert all(changed for path, (_, changed) in lost.items() if path.endswith("lora_a"))
    assert not any(changed for path, (_, changed) in still.items())
    broken = {path: np.array([False, True]) for path in still}
    with pytest.raises(ValueError, match="not finite"):
        contract.check_moved(broken, updates=1)
    zero = {
        k: v * 0 if k.endswith("q_proj/lora_scale") else v
        for k, v in flatten(combine(trained, frozen)).items()
    }
    from lorax_ft.tree import unflatten

    with pytest.raises(ValueError, match="the scale of layers/self_attn/q_proj is 0"):
        contract.check_active(unflatten(zero))


def test_a_factor_frozen_at_zero_is_an_error(model: Model) -> None:
    trained, frozen = adapted(model, targets=("embed_tokens", "q_proj"))
    params = combine(trained, frozen)
    with pytest.raises(
        ValueError, match=r"embed_tokens/lora_a starts at 0, and adapter\.freeze keeps it there"
    ):
        contract.check_frozen(params, ("lora_a",))
    with pytest.raises(ValueError, match=r"q_proj/lora_b starts at 0"):
        contract.check_frozen(params, ("lora_b",))
    with pytest.raises(ValueError, match=r"adapter\.freeze is .*: nothing would train"):
        lft.AdapterConfig(freeze=("lora_a", "lora_b"))
    report = {"q_proj/lora_b": np.array([True, True])}
    contract.check_moved(report, updates=1)
    with pytest.raises(ValueError, match="q_proj did not move"):
        contract.check_moved({"q_proj/lora_b": np.array([True, False])}, updates=1)
