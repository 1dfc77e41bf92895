"""Gradients of adapted layers and models equal a float64 reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from layer_cases import dropped_input, random_layer, reference
from method_cases import KEY, Adapted, distance

from lorax_ft import adapt, combine, linear, partition
from lorax_ft.lowrank.terms.magnitude import column_norm
from lorax_ft.schema import is_adapter
from lorax_ft.tree import Tree, flatten, modules, unflatten

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_gradients_of_a_layer_equal_a_float64_reference(
    dora: bool, kept: bool, dropout: bool
) -> None:
    rng = np.random.default_rng(0)
    full, x64, weights = (
        random_layer(rng, dora=dora, kept=kept),
        rng.normal(size=(4, 6)),
        rng.normal(size=(4, 5)),
    )
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), full)
    x, drop, x_dropped = jnp.asarray(x64, jnp.float32), {}, None
    if dropout:
        drop = {"dropout_key": KEY, "dropout_rate": jnp.float32(0.4)}
        x_dropped = np.asarray(dropped_input(drop, jnp.ones_like(x)), np.float64) * x64

    def loss(layer: Tree, x: Array) -> Array:
        layer = layer | drop
        if dora:
            layer["norm"] = column_norm(layer)
        return jnp.sum(jnp.asarray(weights, jnp.float32) * linear(layer, x, jnp.matmul))

    got, got_x = jax.grad(loss, argnums=(0, 1))(single, x)
    with jax.enable_x64(True):

        def loss64(layer: Tree, x: Array) -> Array:
            d = x if x_dropped is None else jnp.asarray(x_dropped / np.where(x64 == 0, 1, x64)) * x
            return jnp.sum(jnp.asarray(weights) * reference(layer, x, x_dropped=d))

        want, want_x = jax.grad(loss64, argnums=(0, 1))(
            jax.tree.map(jnp.asarray, full), jnp.asarray(x64)
        )
    assert distance(got_x, want_x) < 2e-6
    for name in ("lora_a", "lora_b", "bias", *(["magnitude"] if dora else [])):
        assert distance(got[name], want[name]) < 2e-6, name


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model", ["decoder", "vit_rematted", "convolutions", "einsums"])
def test_gradients_of_a_model_equal_those_through_merging_in_float64(
    zoo: Any, adapted: Adapted, randomize: Any, model: str
) -> None:
    """The reference is the gradient of model(merge(params)), computed in float64."""
    case = zoo(model)
    params = randomize(adapted(model, "pissa_kept-rank_stabilized-dora"))
    trained, frozen = partition(params)

    def loss(trained: Tree) -> Array:
        y = adapt(case.apply)({"params": combine(trained, frozen)}, *case.example)
        return jnp.sum(jnp.sin(y))

    got = flatten(jax.jit(jax.grad(loss))(trained))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        trained64, frozen64 = (
            jax.tree.map(lambda leaf: leaf.astype(jnp.float64), t) for t in (trained, frozen)
        )
        example = tuple(
            x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for x in case.example
        )

        def loss64(trained: Tree) -> Array:
            merged = merged_reference(combine(trained, frozen64), case.layout)
            return jnp.sum(jnp.sin(case.apply({"params": merged}, *example)))

        want = flatten(jax.jit(jax.grad(loss64))(trained64))
    assert set(got) == set(want)
    worst = {path: distance(got[path], want[path]) for path in got}
    assert max(worst.values()) < 2e-5, max(worst, key=worst.__getitem__)


def merged_reference(params: Tree, layout: Any) -> Tree:
    """Every adapted kernel merged by einsums over its axes; a tied head gets its own kernel."""
    layers = modules(params)
    if "lm_head" in layers and "kernel" not in layers["lm_head"]:
        layers["lm_head"]["kernel"] = layers["embed_tokens"]["embedding"].T
    result = {}
    for path, layer in layers.items():
        result[path] = {name: leaf for name, leaf in layer.items() if not is_adapter(name)}
        if "lora_a" in layer:
            name = "embedding" if "embedding" in layer else "kernel"
            result[path][name] = _merged(layer, layer[name], layout[path])
    return unflatten(
        {f"{path}/{name}": leaf for path, layer in result.items() for name, leaf in layer.items()}
    )


def _merged(layer: Tree, w: Array, spec: Any) -> Array:
    letters = "abcdefghij"
    stack, ins, outs = (
        "".join(letters[i] for i in axes) for axes in (spec.stack, spec.ins, spec.outs)
    )

    def in_order(used: str, r: str) -> str:
        """The leaf's axes in the kernel's order, with r in place of the first replaced axis."""
        return "".join(
            sorted(used, key=lambda c: letters.index(r) if c == "r" else letters.index(c))
        )

    a_axes, b_axes = in_order(stack + ins + "r", outs[0]), in_order(stack + outs + "r", ins[0])
    order = letters[: w.ndim]

    def product(a: str, b: str, scale: str) -> Array:
        return jnp.einsum(f"{stack},{a_axes},{b_axes}->{order}", layer[scale], layer[a], layer[b])

    w = w - product("lora_a0", "lora_b0", "start_scale") if "start_scale" in layer else w
    merged = w + product("lora_a", "lora_b", "lora_scale")
    norm = jax.lax.stop_gradient(
        jnp.sqrt(jnp.einsum(f"{order},{order}->{stack}{outs}", merged, merged))
    )
    return jnp.einsum(f"{order},{stack}{outs}->{order}", merged, layer["magnitude"] / norm)
