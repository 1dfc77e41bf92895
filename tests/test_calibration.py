"""Statistics for the inits from data, measured in scans and shards, equal a direct computation."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from lorax_ft import AdapterConfig, add_adapters, calibrate
from lorax_ft.config import MeshConfig
from lorax_ft.lowrank.inits.eva import redistributed
from lorax_ft.lowrank.intercept import adapt
from lorax_ft.models.attention import make_rope_and_mask
from lorax_ft.models.decoder import Block, Carry, Shared, Step
from lorax_ft.models.linear_attention import make_rows
from lorax_ft.models.model import Model
from lorax_ft.models.parts import norm
from lorax_ft.quant.kernels import quantize
from lorax_ft.sharding import DECODER_RULES, make_mesh, param_shardings, place_batch
from lorax_ft.training.calibration import measured
from lorax_ft.training.losses import batch_loss
from lorax_ft.tree import flatten, modules, unflatten

KEY = jax.random.key(3)
TARGETS = ("all-linear", "lm_head")
pytestmark = pytest.mark.usefixtures("strict")


def inputs_of(model: Model, batch: dict[str, np.ndarray]) -> dict[str, Array]:
    """Each Dense layer's inputs of tokens that are not padding, a layer at a time, without a scan.

    A callback inside the scan would be shorter, but `nn.scan` of flax 0.12.12 refuses it: its check
    of broadcast variables keeps every effect of the body, and takes what the effect reads for one.
    """
    c, params = model.config, model.params
    seen: dict[str, list[np.ndarray]] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            path = "/".join(("layers", *context.module.path))
            seen.setdefault(path, []).append(np.float64(args[0]))
        return next_fun(*args, **kwargs)

    tokens = jnp.asarray(batch["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rope_and_mask, types = make_rope_and_mask(c, positions, None, slots=None, length=None)
    shared = Shared(rope_and_mask, positions, tokens - c.vocab_size, make_rows(None, None), None)
    x = params["embed_tokens"]["embedding"][tokens]
    with nn.intercept_methods(record):
        for i in range(c.layers):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            block = Block(c, c.each_layer[i])
            step = Step(jnp.int32(i), types[i])
            (x, _), _ = block.apply({"params": layer}, Carry(x, None), shared, step)
    features = norm(c, "norm").apply({"params": params["norm"]}, x)
    stacked = {path: np.stack(xs) for path, xs in seen.items()} | {"lm_head": np.float64(features)}
    inside = batch["segment_ids"].reshape(-1) > 0
    return {
        path: x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., inside, :]
        for path, x in stacked.items()
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("init", ["eva", "corda"])
@pytest.mark.parametrize("tied", [True, False])
def test_inputs_are_measured_inside_the_scan(
    decoder: Any, padded_batches: Any, init: str, tied: bool
) -> None:
    model, batches = decoder(tied=tied), padded_batches()
    found = calibrate(model, AdapterConfig(rank=2, targets=TARGETS, init=init), batches)
    parts = [inputs_of(model, batch) for batch in batches]
    assert set(found) == set(parts[0])
    for path, got in found.items():
        x = np.concatenate([part[path] for part in parts], axis=-2)
        x = x - x.mean(-2, keepdims=True) if init == "eva" else x
        want = x.swapaxes(-1, -2) @ x / x.shape[-2]
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), err_msg=path)


def test_gradients_are_those_of_the_mean_loss(decoder: Any, padded_batches: Any) -> None:
    model, batches = decoder(tied=False), padded_batches()
    found = calibrate(model, AdapterConfig(rank=2, targets=TARGETS, init="lora_ga"), batches)

    def mean_loss(params: Any) -> Array:
        labeled = sum(float(batch["weights"].sum()) for batch in batches)
        losses = [
            batch_loss(model, params, jax.tree.map(jnp.asarray, b), packed=False) for b in batches
        ]
        return sum(losses, jnp.zeros(())) / jnp.float32(labeled)

    want = flatten(jax.grad(mean_loss)(model.params))
    for path, got in found.items():
        np.testing.assert_allclose(got, want[f"{path}/kernel"], atol=1e-6, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("init", ["eva", "lora_one"])
def test_measuring_on_a_mesh_gives_the_same(decoder: Any, padded_batches: Any, init: str) -> None:
    model, batches = decoder(), padded_batches()
    config = AdapterConfig(rank=2, targets=TARGETS, init=init)
    want = calibrate(model, config, batches)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.tree.map(
        jax.device_put,
        model.params,
        param_shardings(model.params, DECODER_RULES, layout=model.layout, mesh=mesh),
    )
    with jax.set_mesh(mesh):
        sharded = dataclasses.replace(model, params=placed)
        got = calibrate(sharded, config, [place_batch(batch, mesh) for batch in batches])
    for path, leaf in got.items():
        np.testing.assert_allclose(
            leaf, want[path], atol=1e-5 * np.abs(want[path]).max(), err_msg=path
        )


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_quantized_model_is_measured_as_it_is(
    decoder: Any, padded_batches: Any, init: str
) -> None:
    """The statistics equal those of the model with dequantized kernels."""
    model, config = decoder(), AdapterConfig(rank=2, targets=TARGETS, init=init)
    flat = flatten(model.params)
    names = [path for path in flat if "_proj/kernel" in path]
    leaves = {path: quantize(flat[path], format="nf4", n_stack=1, n_in=1) for path in names}
    rounded = {path: leaf.dequantized(jnp.float32) for path, leaf in leaves.items()}
    got, want = (
        calibrate(
            dataclasses.replace(model, params=unflatten(flat | kernels)), config, padded_batches()
        )
        for kernels in (leaves, rounded)
    )
    for path, leaf in got.items():
        np.testing.assert_allclose(
            leaf, want[path], atol=1e-5 * np.abs(want[path]).max(), err_msg=path
        )


@pytest.mark.slow
def test_modules_in_several_groups_are_measured_alike(
    decoder: Any, padded_batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config, shares = decoder(), AdapterConfig(rank=2, init="lora_one"), []
    want = calibrate(model, config, padded_batches())
    monkeypatch.setattr("lorax_ft.training.calibration.GROUP_BYTES", 2 * 3 * 32 * 32 * 4)
    got = calibrate(model, config, padded_batches(), advance=shares.append)
    assert set(got) == set(want)
    assert len(shares) > 2
    assert abs(sum(shares) - 1) < 1e-6
    for path, leaf in got.items():
        np.testing.assert_allclose(leaf, want[path], rtol=1e-5, atol=1e-6)


# -------------------- one at a time


def test_sums_of_one_layer_are_held(decoder: Any, padded_batches: Any) -> None:
    """Of down_proj, the only module with 48 inputs: one matrix, and never those of all layers."""
    model, config = decoder(), AdapterConfig(rank=2, init="corda")
    held = []
    places: list[int] = []
    for path, place, statistic in measured(model, config, padded_batches()):
        if path.endswith("down_proj"):
            places.append(place)
        assert statistic.shape == ((48, 48) if path.endswith("down_proj") else (32, 32))
        held.append([leaf.shape for leaf in jax.live_arrays() if leaf.shape[-2:] == (49, 49)])
    assert places == [0, 1, 2]
    assert max(map(len, held)) == 1
    assert all(shape == (49, 49) for shapes in held for shape in shapes)


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_starts_from_single_statistics_are_those_from_stacks(
    decoder: Any, padded_batches: Any, init: str
) -> None:
    model, batches = decoder(), padded_batches(8)
    config = AdapterConfig(rank=2, init=init, targets=("down_proj", "q_proj", "lm_head"))
    want, got = (
        add_adapters(model.params, config, layout=model.layout, key=KEY, statistics=statistics)
        for statistics in (calibrate(model, config, batches), measured(model, config, batches))
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


# -------------------- ranks


def test_ranks_go_to_what_explains_most() -> None:
    explained = {
        "a": np.array([[0.9, 0.05, 0.01, 0.01], [0.5, 0.3, 0.2, 0.1]]),
        "b": np.array([[0.02, 0.01, 0, 0]]),
    }
    two = {"a": np.array([2, 2]), "b": np.array([2])}
    got = redistributed(two, explained, rho=2.0)
    assert {path: ranks.tolist() for path, ranks in got.items()} == {"a": [1, 4], "b": [1]}
    got = redistributed(two, explained, rho=1.5)
    assert {path: ranks.tolist() for path, ranks in got.items()} == {"a": [2, 3], "b": [1]}
    got = redistributed(two, explained, rho=1.0)
    assert {path: ranks.tolist() for path, ranks in got.items()} == {"a": [2, 2], "b": [2]}
    with pytest.raises(ValueError, match=r"vary in 10 directions over .*, fewer than the 12 ranks"):
        redistributed({"a": np.array([4, 4]), "b": np.array([4])}, explained, rho=1.0)


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
def test_alpha_follows_the_ranks(decoder: Any, padded_batches: Any, scaling: str) -> None:
    """As in PEFT, alpha becomes alpha r' / r: LoRA's scale stays, rsLoRA's grows with √r'."""
    model = decoder()
    config = AdapterConfig(rank=4, alpha=8.0, init="eva", scaling=scaling)
    statistics = calibrate(model, config, padded_batches(8))
    params = add_adapters(model.params, config, layout=model.layout, key=KEY, statistics=statistics)
    layers = [layer for layer in modules(params).values() if "lora_a" in layer]
    ranks = np.concatenate([np.asarray((layer["lora_a"] != 0).any(1).sum(1)) for layer in layers])
    scales = np.concatenate([np.asarray(layer["lora_scale"]) for layer in layers])
    assert ranks.sum() == 4 * len(ranks)
    assert ranks.max() > 4
    want = np.where(ranks > 0, 8 / 4, 0) if scaling == "standard" else 8 / 4 * np.sqrt(ranks)
    np.testing.assert_allclose(scales, want, rtol=1e-6)
    assert {layer["lora_a"].shape[-1] for layer in layers} == {8}


# -------------------- errors


def test_a_start_from_data_without_data_says_what_to_call(
    decoder: Any, padded_batches: Any
) -> None:
    model = decoder()
    config = AdapterConfig(rank=2, init="eva", targets=("q_proj",))
    for given, message in (
        ({}, r"no statistic of layers/self_attn/q_proj; measure it with lorax_ft.calibrate"),
        (
            {"layers/self_attn/q_proj": np.ones((3, 5, 5))},
            r"is \(3, 5, 5\); it must be \(3, 32, 32\)",
        ),
        ({"layers/self_attn/q_proj": np.zeros((3, 32, 32))}, r"0 or not finite in matrix 0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            add_adapters(model.params, config, layout=model.layout, key=KEY, statistics=given)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no batch"):
        calibrate(model, config, [])
    empty = [{name: np.zeros_like(leaf) for name, leaf in padded_batches()[0].items()}]
    with pytest.raises(ValueError, match="no token of the calibration batches counts"):
        calibrate(model, config, empty)
    assert calibrate(model, AdapterConfig(rank=2), []) == {}


def test_lora_ga_of_too_large_a_rank_raises(decoder: Any, padded_batches: Any) -> None:
    model = decoder()
    with pytest.raises(
        ValueError, match=r"k_proj: LoRA-GA of rank 9 needs 18 singular vectors.*32 × 16"
    ):
        calibrate(
            model, AdapterConfig(rank=9, init="lora_ga", targets=("k_proj",)), padded_batches()
        )


def test_embeddings_start_at_random_and_need_no_data(decoder: Any) -> None:
    model = decoder()
    config = AdapterConfig(rank=2, init="eva", targets=("embed_tokens",))
    assert calibrate(model, config, []) == {}
    params = add_adapters(model.params, config, layout=model.layout, key=KEY)
    assert params["embed_tokens"]["lora_a"].shape == (97, 2)
    adapt(model.apply)({"params": params}, jnp.ones((1, 4), jnp.int32))
