"""Bottleneck adapters: the equation, where they start, what trains, folders, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from method_cases import DENSE, KEY, distance
from zoo import TINY

import lorax_ft as lft
from lorax_ft.config import QuantConfig
from lorax_ft.lowrank.quantize import quantize_base
from lorax_ft.models.config import Experts
from lorax_ft.models.model import CausalLM, abstract_params
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


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x: Array, *, scale: float = 1.0) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (8, 6))
        return scale * jnp.tanh(nn.Dense(8, name="up")(x)) @ kernel


class Doubled(FeedForward):
    def __call__(self, x: Array, **options: Any) -> Array:
        return 2 * super().__call__(x, **options)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x + nn.remat(Doubled)(name="mlp")(x, scale=0.5)


@pytest.mark.parametrize("sees", INPUTS)
def test_a_whole_module_computes_the_equation_and_all_of_it_trains(
    randomize: Any, sees: str
) -> None:
    x = jax.random.normal(KEY, (2, 3, 6))
    model = Residual()
    base = model.init(KEY, x)["params"]
    layout = lft.layout(model.apply, base, x)
    added = lft.add_adapters(base, config_of(sees, targets=("mlp",)), layout=layout, key=KEY)
    apply, plain = jax.jit(lft.adapt(model.apply)), jax.jit(model.apply)
    np.testing.assert_array_equal(apply({"params": added}, x), plain({"params": base}, x))
    params = randomize(added)
    leaves = params["mlp"]
    h = Doubled().apply({"params": base["mlp"]}, x, scale=0.5)
    u = h if sees == "output" else x
    hidden = jax.nn.relu(u @ leaves[f"bottleneck_a_{sees}"] + leaves["bottleneck_bias_a"])
    expected = x + h + hidden @ leaves["bottleneck_b"] + leaves["bottleneck_bias_b"]
    found = apply({"params": params}, x)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    trained, frozen = lft.partition(params)

    def loss(trained: Any) -> Array:
        return jnp.sum(jnp.sin(apply({"params": lft.combine(trained, frozen)}, x)))

    gradients = jax.jit(jax.grad(loss))(trained)["mlp"]
    assert set(gradients) == set(leaves) - {"bottleneck_active", "kernel", "up"}
    assert all(jnp.any(leaf != 0) for leaf in gradients.values())
    off = lft.disable_adapters(params, base, layout=layout)
    np.testing.assert_array_equal(apply({"params": off}, x), plain({"params": base}, x))


@pytest.mark.parametrize("targets", [DENSE, ("attention",)])
@pytest.mark.parametrize("sees", INPUTS)
def test_scanned_layers_start_as_the_base_and_equal_single_ones(
    zoo: Any, randomize: Any, sees: str, targets: tuple[str, ...]
) -> None:
    outputs = []
    for name in ("vit_scanned", "vit_unrolled"):
        case = zoo(name)
        config = config_of(sees, targets=targets)
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


@pytest.mark.parametrize("targets", [("o_proj", "down_proj"), ("mlp", "q_proj")])
@pytest.mark.parametrize("sees", INPUTS)
def test_a_folder_keeps_logits_and_says_who_reads_it(
    speaker: Any, tmp_path: Path, randomize: Any, sees: str, targets: tuple[str, ...]
) -> None:
    model = speaker
    config = config_of(sees, targets=targets, rank_pattern=("layers/1/.*=2",))
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


def test_beside_the_mlps_of_some_layers(decoder: Any, randomize: Any) -> None:
    model = decoder()
    config = config_of("input", targets=("mlp", "layers/1/.*/q_proj"), exclude=("layers/0/mlp",))
    params = lft.add_adapters(model.params, config, layout=model.layout, key=KEY)
    active = {
        path: leaf.tolist() for path, leaf in flatten(params).items() if path.endswith("_active")
    }
    assert active == {
        "layers/mlp/bottleneck_active": [0, 1, 1],
        "layers/self_attn/q_proj/bottleneck_active": [0, 1, 0],
    }
    with pytest.raises(ValueError, match=r"layers/mlp: a bottleneck adapter cannot be merged"):
        lft.merge_adapters(params, layout=model.layout)


def test_beside_sparse_mlps(randomize: Any) -> None:
    """Also where the router's loss gives them a second array."""
    changed = {"experts": Experts(count=4, top_k=2, renormalized=True), "expert_products": "dense"}
    model = CausalLM(config=dataclasses.replace(TINY, layers=1, **changed))
    shapes = abstract_params(model.config)
    base = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape) / 6, shapes)
    config = config_of("input", targets=("mlp",))
    added = lft.add_adapters(base, config, layout=model.layout, key=KEY)
    tokens = jnp.arange(16).reshape(2, 8)

    @jax.jit
    def features(params: Any) -> tuple[Array, Array]:
        counted = jnp.ones((2, 8), bool)
        with_usage, _ = model.features_and_usage(params, tokens, counted=counted)
        return with_usage, model.features(params, tokens)[0]

    start, _ = features(added)
    np.testing.assert_array_equal(start, features(base)[0])
    moved, plain = features(randomize(added))
    assert distance(moved, start) > 1e-3
    np.testing.assert_allclose(moved, plain, atol=1e-6)


def test_modules_beside_which_none_can_stand(zoo: Any) -> None:
    case, vit = zoo("decoder"), zoo("vit_unrolled")

    def refuse(case: Any, target: str, problem: str, **fields: Any) -> None:
        config = config_of("input", targets=(target,), **fields)
        with pytest.raises(ValueError, match=problem) as error:
            lft.add_adapters(case.params, config, layout=case.layout, key=KEY)
        assert "\n" not in str(error.value)

    refuse(case, "self_attn", r"'self_attn' matches layers/self_attn, which is called with \d+ arr")
    refuse(case, "self_attn", r"; name its layers: q_proj k_proj v_proj o_proj$")
    refuse(case, "input_layernorm", "is not the MLP of a layer, so that no bottleneck")
    refuse(case, "mpl", "'mpl' matches no module")
    refuse(vit, "layers/1", r"matches layers/1, which gives a tuple, not one array")
    # Of scanned layers the tree has no numbers.
    refuse(case, "layers/1/self_attn", r"matches layers/self_attn, which is called with \d+ arr")
    refuse(case, "layers/1/input_layernorm", "'.*' matches .*, which is not the MLP of a layer")
    refuse(case, r"layers/\d/self_attn", r"matches layers/self_attn, which is called with \d+ arr")
    refuse(case, "layers/3/self_attn", "'layers/3/self_attn' matches no module")
    config = lft.AdapterConfig(targets=("mlp",))
    with pytest.raises(
        ValueError,
        match=r"'mlp' matches layers/mlp, a whole module, and lora adapts layers; name its layers: "
        "gate_proj up_proj down_proj",
    ):
        lft.add_adapters(case.params, config, layout=case.layout, key=KEY)


def test_a_module_of_another_width_or_without_parameters() -> None:
    class Wider(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dense(5, name="up")(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return nn.Dropout(0.1, deterministic=True, name="drop")(Wider(name="wider")(x))

    x = jnp.ones((2, 3))
    params = Model().init(KEY, x)["params"]
    layout = lft.layout(Model().apply, params, x)
    for target, problem in {
        "wider": r"wider, which gives \(2, 5\) of \(2, 3\).*; name its layers: up",
        "drop": "'drop' matches no module",
    }.items():
        config = config_of("input", targets=(target,))
        with pytest.raises(ValueError, match=problem):
            lft.add_adapters(params, config, layout=layout, key=KEY)


def test_refusals(zoo: Any) -> None:
    case = zoo("decoder")
    params = lft.add_adapters(case.params, config_of("output"), layout=case.layout, key=KEY)
    with pytest.raises(
        ValueError, match=r"a bottleneck adapter cannot be merged.*; save_peft or save_adapter"
    ):
        lft.merge_adapters(params, layout=case.layout)
    config = config_of("output", targets=("embed_tokens",))
    with pytest.raises(ValueError, match=r"bottleneck is not for embeddings; exclude them"):
        lft.add_adapters(case.params, config, layout=case.layout, key=KEY)
    with pytest.raises(ValueError, match=r"adapter.alpha is 2.* does not use it"):
        config_of("output", alpha=2.0)


def test_a_module_that_shares_its_layers_scope_has_one_bottleneck() -> None:
    class Wrap(nn.Module):
        def setup(self) -> None:
            self.inner = nn.Dense(6)
            nn.share_scope(self, self.inner)

        def __call__(self, x: Array) -> Array:
            return self.inner(x)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return Wrap(name="wrap")(x)

    x = jax.random.normal(KEY, (2, 6))
    params = Model().init(KEY, x)["params"]
    layout = lft.layout(Model().apply, params, x)
    adapted = lft.add_adapters(
        params, config_of("input", targets=("wrap",)), layout=layout, key=KEY
    )
    layer = adapted["wrap"]
    layer["bottleneck_b"] = jax.random.normal(KEY, layer["bottleneck_b"].shape)
    hidden = jax.nn.relu(x @ layer["bottleneck_a_input"] + layer["bottleneck_bias_a"])
    expected = x @ layer["kernel"] + layer["bias"] + hidden @ layer["bottleneck_b"]
    found = lft.adapt(Model().apply)({"params": adapted}, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_second_array_of_the_outputs_shape_is_refused() -> None:
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x: Array, mask: Any = None) -> Array:
            y = nn.Dense(3, name="up")(x)
            return y if mask is None else y * mask

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array, mask: Any = None) -> Array:
            return Masked(name="masked")(mask=mask, x=x)

    x = jnp.ones((2, 3))
    params = Model().init(KEY, x)["params"]
    layout = lft.layout(Model().apply, params, x)
    config = config_of("input", targets=("masked",))
    adapted = lft.add_adapters(params, config, layout=layout, key=KEY)
    with pytest.raises(ValueError, match="called with 2 arrays of its output's shape"):
        lft.adapt(Model().apply)({"params": adapted}, x, x)
