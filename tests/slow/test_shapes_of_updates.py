"""The methods whose ΔW is not A B on a mesh: the gradients of one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from method_cases import KEY

import lorax_ft as lft
from lorax_ft import sharding
from lorax_ft.config import MeshConfig
from lorax_ft.tree import Tree, flatten

METHODS: dict[str, dict[str, Any]] = {
    "vera": {},
    "loha": {"rank": 2},
    "lokr": {"rank": 1},
    "shira": {"rank": 2},
    "hira": {"rank": 2},
    "oft": {"oft_block_size": 8},
    "bottleneck": {"rank": 2},
    "parallel": {
        "method": "bottleneck",
        "rank": 2,
        "bottleneck_input": "input",
        "targets": ("mlp",),
    },
}


def config_of(name: str, **fields: Any) -> lft.AdapterConfig:
    return lft.AdapterConfig(**{"method": name, **METHODS[name], **fields})


@pytest.mark.parametrize("method", METHODS)
def test_gradients_do_not_depend_on_the_mesh(decoder: Any, randomize: Any, method: str) -> None:
    model = decoder()
    config = config_of(method)
    params = randomize(lft.add_adapters(model.params, config, layout=model.layout, key=KEY))
    tokens = jnp.arange(64).reshape(8, 8)

    def gradient(params: Tree, tokens: Array) -> Tree:
        trained, frozen = lft.partition(params)

        def loss(trained: Tree) -> Array:
            y = model.apply({"params": lft.combine(trained, frozen)}, tokens)
            return jnp.mean(jnp.sin(y))

        return jax.grad(loss)(trained)

    want = flatten(jax.jit(gradient)(params, tokens))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rules = sharding.DECODER_RULES
    shardings = sharding.param_shardings(params, rules, layout=model.layout, mesh=mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        got = flatten(jax.jit(gradient)(placed, tokens))
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_not_adapted_have_no_gradient(
    decoder: Any, randomize: Any, method: str
) -> None:
    model = decoder()
    target = "mlp" if method == "parallel" else "down_proj"
    config = config_of(method, targets=(target,), layers=(1,))
    params = randomize(lft.add_adapters(model.params, config, layout=model.layout, key=KEY))
    trained, frozen = lft.partition(params)
    tokens = jnp.arange(16).reshape(2, 8)

    def loss(trained: Tree) -> Array:
        return jnp.sum(jnp.sin(model.apply({"params": lft.combine(trained, frozen)}, tokens)))

    for path, gradient in flatten(jax.jit(jax.grad(loss))(trained)).items():
        assert not gradient[0].any(), path
        assert not gradient[2].any(), path
        assert gradient[1].any(), path
    if config.method == "bottleneck":  # It merges into no kernel.
        return
    merged = lft.merge_adapters(params, layout=model.layout)["layers"]["mlp"]["down_proj"]
    base = model.params["layers"]["mlp"]["down_proj"]
    np.testing.assert_array_equal(merged["kernel"][::2], base["kernel"][::2])


@pytest.mark.parametrize("method", ["vera", "shira", "hira", "parallel"])
def test_a_whole_matrix_or_a_shared_leaf_in_a_vmapped_sweep(
    decoder: Any, randomize: Any, method: str
) -> None:
    """Adapters side by side, as a sweep computes them, equal each by itself."""
    model = decoder()
    config = config_of(method)
    fresh = lft.add_adapters(model.params, config, layout=model.layout, key=KEY)
    owned = []
    for seed in range(2):
        adapters, base = lft.partition(randomize(fresh, seed=seed), by="ownership")
        owned.append(adapters)
    tokens = jnp.arange(16).reshape(2, 8)

    def logits(adapters: Tree) -> Array:
        return model.apply({"params": lft.combine(adapters, base)}, tokens)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *owned)
    got = jax.jit(jax.vmap(logits))(stacked)
    for i, adapters in enumerate(owned):
        np.testing.assert_allclose(got[i], jax.jit(logits)(adapters), atol=1e-5)
