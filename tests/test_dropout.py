"""Dropout acts only on the adapter branch, in every model, and keeps its expectation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from layer_cases import dropped_input, random_layer, reference
from method_cases import KEY, Adapted, distance

from lorax_ft import adapt, combine, linear, partition, with_dropout
from lorax_ft.lowrank.terms.magnitude import column_norm
from lorax_ft.tree import Tree

pytestmark = pytest.mark.usefixtures("strict")


def test_dropout_of_rate_zero_is_no_dropout(adapted: Adapted) -> None:
    params = adapted("decoder", "kaiming-standard")
    assert with_dropout(params, KEY, rate=0.0) is params


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize(("model", "target"), [("vit_scanned", "up"), ("einsums", "experts_up")])
def test_dropout_takes_keys_of_both_styles(
    zoo: Any, adapted: Adapted, randomize: Any, model: str, target: str, make_key: Any
) -> None:
    case = zoo(model)
    params = randomize(adapted(model, "kaiming-standard", targets=(target,)))
    y = case.forward(with_dropout(params, make_key(0), rate=0.5))
    assert distance(y, case.forward(params)) > 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_keeps_the_expectation(dora: bool) -> None:
    layer = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32),
        random_layer(np.random.default_rng(1), dora=dora, kept=False),
    )
    layer |= {"norm": column_norm(layer)} if dora else {}
    x = jax.random.normal(KEY, (2, 6))

    def sample(key: Array) -> Array:
        return linear(layer | {"dropout_key": key, "dropout_rate": jnp.float32(0.3)}, x, jnp.matmul)

    samples = jax.vmap(sample)(jax.random.split(KEY, 4096))
    error = np.abs(samples.mean(0) - linear(layer, x, jnp.matmul)) / (samples.std(0) / 4096**0.5)
    assert error.max() < 4.5
    assert samples.std(0).min() > 0.1


@pytest.mark.parametrize("rate", [0.003, 0.01, 0.05])
def test_small_rates_in_bfloat16_are_what_they_say(rate: float) -> None:
    """bfloat16 has no number between 0.996 and 1, and its uniform draws have only 128 values."""
    ones = jnp.ones((4000, 100), jnp.bfloat16)
    dropped = np.asarray(
        dropped_input({"dropout_key": KEY, "dropout_rate": jnp.float32(rate)}, ones), np.float32
    )
    assert (dropped == 0).mean() == pytest.approx(rate, rel=0.1)


def test_dropout_drops_the_share_it_says_and_scales_the_rest() -> None:
    dropped = np.asarray(
        dropped_input(
            {"dropout_key": KEY, "dropout_rate": jnp.float32(0.2)}, 3 * jnp.ones((4000, 10))
        )
    )
    assert set(np.unique(dropped).round(4).tolist()) == {0, 3.75}
    assert (dropped == 0).mean() == pytest.approx(0.2, abs=0.01)


def test_dropout_acts_on_the_adapter_branch_only(zoo: Any, adapted: Adapted) -> None:
    """With B = 0 nothing changes; PiSSA with keep_base subtracts A₀ B₀ without dropout."""
    case = zoo("decoder")
    start = with_dropout(
        adapted("decoder", "kaiming-standard", targets=("up_proj",)), KEY, rate=0.5
    )
    np.testing.assert_array_equal(case.forward(start), case.plain(case.params))
    kept, moved = (
        with_dropout(adapted("decoder", f"{name}-standard", targets=("up_proj",)), KEY, rate=0.5)
        for name in ("pissa_kept", "pissa")
    )
    assert distance(case.forward(kept), case.forward(moved)) < 1e-5
    assert distance(case.forward(kept), case.plain(case.params)) > 1e-3


@pytest.mark.parametrize("kept", [False, True])
def test_dora_with_dropout_is_pefts_formula(kept: bool) -> None:
    rng = np.random.default_rng(2)
    layer = random_layer(rng, dora=True, kept=kept)
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    drop = {"dropout_key": KEY, "dropout_rate": jnp.float32(0.5)}
    x_dropped = np.asarray(dropped_input(drop, x), np.float64)
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layer) | drop
    got = linear(single | {"norm": column_norm(single)}, x, jnp.matmul)
    with jax.enable_x64(True):
        want = reference(
            jax.tree.map(jnp.asarray, layer),
            jnp.asarray(np.float64(x)),
            x_dropped=jnp.asarray(x_dropped),
        )
    assert distance(got, want) < 1e-6


@pytest.mark.parametrize(
    ("model", "target"),
    [
        ("decoder", "lm_head"),
        ("vit_rematted", "query"),
        ("convolutions", "second"),
        ("einsums", "experts_up"),
    ],
)
def test_every_model_takes_dropout(
    zoo: Any, adapted: Adapted, randomize: Any, model: str, target: str
) -> None:
    case = zoo(model)
    params = randomize(adapted(model, "pissa_kept-rank_stabilized-dora", targets=(target,)))
    trained, frozen = partition(params)

    @jax.jit
    def loss(trained: Tree, key: Array) -> Array:
        whole = with_dropout(combine(trained, frozen), key, rate=0.3)
        return jnp.sum(adapt(case.apply)({"params": whole}, *case.example))

    value = jax.value_and_grad(loss)
    (one, g), (same, _), (other, _) = (value(trained, jax.random.key(i)) for i in (0, 0, 1))
    assert one == same != other
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(g))


def test_every_layer_of_a_stack_drops_differently(adapted: Adapted) -> None:
    layer = with_dropout(adapted("decoder", "kaiming-standard"), KEY, rate=0.5)["layers"]["mlp"]
    keys = np.concatenate(
        [jax.random.key_data(layer[name]["dropout_key"]) for name in ("up_proj", "gate_proj")]
    )
    assert len({tuple(key) for key in keys.tolist()}) == 6
    assert layer["up_proj"]["dropout_rate"].shape == (3,)
