"""Bottleneck adapters: the equation, where they start, what trains, folders, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import DENSE, KEY, distance

import lorax_ft as lft
from lorax_ft.config import QuantConfig
from lorax_ft.lowrank.quantize import quantize_base
from lorax_ft.tree import flatten, unflatten

pytestmark = pytest.mark.usefixtures("strict")
INPUTS = ("output", "input")


def config_of(sees: Any, **fields: Any) -> lft.AdapterConfig:
    return lft.AdapterConfig(
        **{"method": "bottleneck", "rank": 3, "targets": DENSE, "bottleneck_input": sees, **fields}
    )


@pytest.mark.parametrize("sees", INPUTS)
def test_a_layer_computes_the_equation(sees: str) -> None:
    rng = np.random.default_rng(0)
    w, bias, x = rng.normal(size=(6, 5)), rng.normal(size=5), rng.normal(size=(4, 6))
    side = 5 if sees == "output" else 6
    a, a_bias = rng.normal(size=(side, 3)), rng.normal(size=3)
    b, b_bias = rng.normal(size=(3, 5)), rng.normal(size=5)
    layer = {
        "kernel": w,
        "bias": bias,
        f"bottleneck_a_{sees}": a,
        "bottleneck_bias_a": a_bias,
        "bottleneck_b": b,
        "bottleneck_bias_b": b_bias,
        "bottleneck_active": 1.0,
    }
    h = x @ w + bias
    u = h if sees == "output" else x
    expected = h + np.maximum(u @ a + a_bias, 0) @ b + b_bias
    layer32 = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in layer.items()}
    found = lft.linear(layer32, jnp.asarray(x, jnp.float32), jnp.matmul)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sees", INPUTS)
def test_scanned_layers_start_as_the_base_and_equal_single_ones(
    zoo: Any, randomize: Any, sees: str
) -> None:
    outputs = []
    for name in ("vit_scanned", "vit_unrolled"):
        case = zoo(name)
        config = config_of(sees)
        params = lft.add_adapters(case.params, config, layout=case.layout, key=KEY)
        np.testing.assert_array_equal(case.forward(params), case.plain(case.params))
        # The same values in both: every leaf is what its start is, plus one number.
        moved = {}
        for path, leaf in flatten(params).items():
            moves = "bottleneck" in path and "active" not in path
            moved[path] = leaf + 0.1 if moves else leaf
        outputs.append(case.forward(unflatten(moved)))
        assert distance(outputs[-1], case.plain(case.params)) > 1e-2
    assert distance(*outputs) < 1e-5


def test_padding_and_layers_without_one_get_no_gradient(zoo: Any, randomize: Any) -> None:
    case = zoo("vit_scanned")
    config = config_of("output", rank_pattern=("layers/1/.*=2",), exclude=("layers/2/.*",))
    params = lft.add_adapters(case.params, config, layout=case.layout, key=KEY)
    trained, frozen = lft.partition(params)

    def loss(trained: Any) -> jax.Array:
        y = lft.adapt(case.apply)({"params": lft.combine(trained, frozen)}, *case.example)
        return jnp.sum(y**2)

    for _ in range(2):  # in the first step B = 0 hides A
        gradients = jax.grad(loss)(trained)
        trained = jax.tree.map(lambda leaf, g: leaf - 0.01 * g, trained, gradients)
    up = trained["layers"]["up"]
    assert not np.any(up["bottleneck_b"][1, 2:])
    assert np.any(up["bottleneck_b"][1, :2])
    for name, leaf in up.items():
        assert not np.any(leaf[2]), name
        assert np.any(leaf[0] != 0), name


@pytest.mark.parametrize("sees", INPUTS)
def test_a_folder_keeps_logits_and_says_who_reads_it(
    speaker: Any, tmp_path: Path, randomize: Any, sees: str
) -> None:
    model = speaker
    config = config_of(sees, targets=("o_proj", "down_proj"), rank_pattern=("layers/1/.*=2",))
    added = lft.add_adapters(model.params, config, layout=model.layout, key=KEY)
    params = randomize(added)
    with jax.numpy_dtype_promotion("standard"):
        lft.save_peft(tmp_path / "adapter", params, model)
        read = lft.load_peft(tmp_path / "adapter", model)
        tokens = jnp.arange(8)[None]
        found, expected, base = (
            model.apply({"params": tree}, tokens) for tree in (read, params, model.params)
        )
    assert distance(expected, base) > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)
    card = (tmp_path / "adapter/README.md").read_text()
    assert "PEFT has no such adapter" in card
    assert "lft.load_peft" in card


def test_on_a_quantized_base(decoder: Any, randomize: Any) -> None:
    model = decoder(width=64, mlp_width=96, layers=2, heads=8, kv_heads=4)
    params, _ = quantize_base(model.params, QuantConfig(format="nf4"), layout=model.layout)
    config = config_of("output", targets=("o_proj", "down_proj"))
    added = lft.add_adapters(params, config, layout=model.layout, key=KEY)
    tokens = jnp.arange(8)[None]
    with jax.numpy_dtype_promotion("standard"):
        base, start, moved = (
            model.apply({"params": tree}, tokens) for tree in (params, added, randomize(added))
        )
    np.testing.assert_array_equal(start, base)
    assert distance(moved, base) > 1e-3


def test_refusals(zoo: Any) -> None:
    case = zoo("decoder")
    params = lft.add_adapters(case.params, config_of("output"), layout=case.layout, key=KEY)
    with pytest.raises(
        ValueError, match=r"a bottleneck adapter cannot be merged.*; save_peft writes it"
    ):
        lft.merge_adapters(params, layout=case.layout)
    config = config_of("output", targets=("embed_tokens",))
    with pytest.raises(ValueError, match=r"bottleneck is not for embeddings; exclude them"):
        lft.add_adapters(case.params, config, layout=case.layout, key=KEY)
    with pytest.raises(ValueError, match=r"adapter.alpha is 2.* does not use it"):
        config_of("output", alpha=2.0)
