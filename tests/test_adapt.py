"""Interception: `adapt` reaches every layer of any linen model, in the layer's precision."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from layer_cases import random_layer
from method_cases import KEY, Adapted, distance

from lorax_ft import AdapterConfig, adapt, add_adapters, combine, layout, merge_adapters, partition
from lorax_ft.lowrank.inits.svd import randomized
from lorax_ft.lowrank.linear import merged_kernel
from lorax_ft.lowrank.terms.magnitude import column_norm

pytestmark = pytest.mark.usefixtures("strict")


def test_adapting_twice_is_adapting_once(zoo: Any, adapted: Adapted, randomize: Any) -> None:
    case = zoo("convolutions")
    variables = {"params": randomize(adapted("convolutions", "kaiming-standard-dora"))}
    once, twice = adapt(case.apply), adapt(adapt(case.apply))
    np.testing.assert_array_equal(
        jax.jit(once)(variables, *case.example), jax.jit(twice)(variables, *case.example)
    )


def test_without_adapters_adapt_computes_what_apply_does(zoo: Any) -> None:
    case = zoo("vit_rematted")
    np.testing.assert_array_equal(case.forward(case.params), case.plain(case.params))


def test_two_adapters_of_one_base_do_not_share_a_trace(
    zoo: Any, adapted: Adapted, randomize: Any
) -> None:
    """JAX caches the bodies of scan and remat by function; other parameters must still be used."""
    case = zoo("vit_rematted")
    first = randomize(adapted("vit_rematted", "kaiming-standard"), 1)
    second = randomize(adapted("vit_rematted", "kaiming-standard", targets=("up",)), 2)
    apply = adapt(case.apply)
    for params in (case.params, first, second, first):
        y = apply({"params": params}, *case.example)
        want = case.plain(merge_adapters(params, layout=case.layout))
        assert distance(y, want) < 1e-5


def test_adapters_in_a_jitted_method_of_the_model_are_seen() -> None:
    class Jitted(nn.Module):
        def setup(self) -> None:
            self.parts = [nn.Dense(6) for _ in range(2)]

        @nn.jit
        def __call__(self, x: Array) -> Array:
            for part in self.parts:
                x = nn.tanh(part(x))
            return x

    x = jax.random.normal(KEY, (2, 6))
    params = Jitted().init(KEY, x)["params"]
    found = layout(Jitted().apply, params, x)
    base = Jitted().apply({"params": params}, x)
    changed = add_adapters(params, AdapterConfig(rank=2), layout=found, key=KEY)
    changed = {
        name: layer | {"lora_b": jnp.ones_like(layer["lora_b"])} for name, layer in changed.items()
    }
    y = adapt(Jitted().apply)({"params": changed}, x)
    assert distance(y, base) > 1e-2
    assert distance(y, Jitted().apply({"params": merge_adapters(changed, layout=found)}, x)) < 1e-5


@pytest.mark.parametrize("kind", ["dense", "general", "einsum", "conv"])
def test_an_adapted_layer_honors_its_precision(kind: str) -> None:
    module: Any = {
        "dense": nn.Dense(6, precision="highest"),
        "general": nn.DenseGeneral((2, 3), precision="highest"),
        "einsum": nn.Einsum((6, 2, 3), "bti,inh->btnh", precision="highest"),
        "conv": nn.Conv(6, 3, precision="highest"),
    }[kind]
    x = jnp.ones((2, 5, 6))
    params = module.init(KEY, x)["params"]
    config = AdapterConfig(rank=2, init="pissa", keep_base=True, dora=True)
    changed = add_adapters(params, config, layout=layout(module.apply, params, x), key=KEY)
    assert_highest(jax.make_jaxpr(adapt(module.apply))({"params": changed}, x), at_least=5)


@pytest.mark.parametrize("name", ["merged_kernel", "column_norm", "randomized"])
def test_what_is_computed_from_weights_has_highest_precision(name: str) -> None:
    """Accelerators multiply float32 at a lower precision by default."""
    layer = {
        name: leaf
        for name, leaf in random_layer(np.random.default_rng(7), dora=True, kept=True).items()
    }
    layer = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layer)
    if name == "randomized":
        w = jnp.ones((2, 30, 20))
        jaxpr = jax.make_jaxpr(lambda w, k: randomized(w, k, rank=3, iterations=1))(
            w, jax.random.split(KEY, 2)
        )
    else:
        functions = {"merged_kernel": merged_kernel, "column_norm": column_norm}
        jaxpr = jax.make_jaxpr(functions[name])(layer)
    assert_highest(jaxpr, at_least=2)


def assert_highest(jaxpr: Any, *, at_least: int) -> None:
    text = str(jaxpr)
    products = text.count("dot_general[") + text.count("conv_general_dilated[")
    assert products >= at_least
    highest = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") + text.count(
        "precision=Precision.HIGHEST"
    )
    assert highest == products


def test_a_layer_of_another_dot_general_uses_it_for_a_too() -> None:
    seen = []

    def dot_general(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        seen.append(kernel.shape)
        return jax.lax.dot_general(x, kernel, *args, **kwargs)

    module = nn.Dense(6, dot_general=dot_general)
    x = jnp.ones((2, 5))
    params = module.init(KEY, x)["params"]
    changed = add_adapters(
        params, AdapterConfig(rank=2), layout=layout(module.apply, params, x), key=KEY
    )
    seen.clear()
    adapt(module.apply)({"params": changed}, x)
    assert seen == [(5, 6), (5, 2)]


def test_a_layer_called_twice_is_adapted_twice() -> None:
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            layer = nn.Dense(6, name="shared")
            return layer(nn.tanh(layer(x)))

    x = jax.random.normal(KEY, (2, 6))
    params = Shared().init(KEY, x)["params"]
    found = layout(Shared().apply, params, x)
    changed = add_adapters(
        params, AdapterConfig(rank=2, init="pissa", keep_base=True), layout=found, key=KEY
    )
    changed["shared"]["lora_b"] = -changed["shared"]["lora_b"]
    y = adapt(Shared().apply)({"params": changed}, x)
    assert distance(y, Shared().apply({"params": merge_adapters(changed, layout=found)}, x)) < 1e-5


def test_a_layer_of_many_modules_in_a_vmap_is_a_stack() -> None:
    class Many(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            stack = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=4,
            )
            return stack(5, name="many")(x)

    x = jax.random.normal(KEY, (2, 6))
    params = Many().init(KEY, x)["params"]
    found = layout(Many().apply, params, x)
    changed = add_adapters(
        params, AdapterConfig(rank=2, init="pissa", dora=True), layout=found, key=KEY
    )
    changed["many"]["magnitude"] = changed["many"]["magnitude"] * 1.5
    y = adapt(Many().apply)({"params": changed}, x)
    assert distance(y, Many().apply({"params": merge_adapters(changed, layout=found)}, x)) < 1e-5


def test_several_adapters_over_one_base_by_vmap(zoo: Any, adapted: Adapted, randomize: Any) -> None:
    """vmap over the adapters' leaves only: the base is not copied; each output is its adapter's."""
    case = zoo("vit_scanned")
    start = adapted("vit_scanned", "kaiming-standard-dora", targets=("up", "query", "classes"))
    trees = [randomize(start, seed) for seed in (1, 2)]
    owned, base = zip(*(partition(tree, by="ownership") for tree in trees), strict=True)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *owned)
    many = jax.vmap(
        lambda mine: adapt(case.apply)({"params": combine(mine, base[0])}, *case.example)
    )(stacked)
    for y, tree in zip(many, trees, strict=True):
        assert distance(y, case.forward(tree)) < 1e-5
