"""The step on meshes of fake devices, and whole runs in two processes: the same numbers as on one device.

Letters: M microbatches, B rows, T tokens, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lorax_ft.config import AdapterConfig, MeshConfig, OptimConfig
from lorax_ft.lowrank.adapters import add_adapters
from lorax_ft.lowrank.groups import partition
from lorax_ft.models.llama import SHARDING_RULES
from lorax_ft.models.model import Model
from lorax_ft.training import sharding
from lorax_ft.training.optimizer import make_optimizer
from lorax_ft.training.step import TrainState, make_train_step
from lorax_ft.tree import Tree, combine, flatten, unflatten

STEPS, ROWS, TOKENS = 3, 16, 16
SIZES: dict[str, int] = {"vocab_size": 96, "width": 32, "mlp_width": 48, "layers": 2, "heads": 4, "kv_heads": 2}
MESHES = {  # and the microbatches on it
    "data=8": (MeshConfig(data=8), 1),
    "data=2,fsdp=4": (MeshConfig(data=2, fsdp=4), 1),
    "data=2,fsdp=2,tensor=2 in 4 microbatches": (MeshConfig(data=2, fsdp=2, tensor=2), 4),
}
METHODS = {
    "lora": AdapterConfig(rank=4),
    "dora": AdapterConfig(rank=4, dora=True),
    "full": AdapterConfig(targets=(), train_whole=("all",)),
}
OPTIM = OptimConfig(learning_rate=1e-2, schedule="constant", warmup_fraction=0, clip_norm=1.0)

Build = Callable[..., Model]


@dataclasses.dataclass(frozen=True)
class Run:
    """What three steps came to."""

    losses: np.ndarray
    trained: dict[str, np.ndarray]
    state: TrainState


@pytest.fixture(autouse=True)
def _promotion() -> Iterator[None]:
    """Optax multiplies integers and floats (`decay**count`), which conftest's strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def one_device(decoder: Build) -> Callable[..., Run]:
    """Three steps of a method on one device, computed once."""
    return functools.cache(lambda method, dtype="float32": steps(decoder, method, None, dtype=dtype))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", METHODS)
def test_steps_do_not_depend_on_the_mesh(
    decoder: Build, one_device: Callable[..., Run], method: str, mesh: str
) -> None:
    expected, got = one_device(method), steps(decoder, method, *MESHES[mesh])
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    for path, leaf in expected.trained.items():
        np.testing.assert_allclose(got.trained[path], leaf, rtol=1e-5, atol=1e-4, err_msg=path)
    check_places(got.state)


@pytest.mark.parametrize("mesh", MESHES)
def test_first_steps_over_a_bfloat16_base_do_not_depend_on_the_mesh(
    decoder: Build, one_device: Callable[..., Run], mesh: str
) -> None:
    expected, got = one_device("lora", "bfloat16"), steps(decoder, "lora", *MESHES[mesh], dtype="bfloat16")
    print(got.losses / expected.losses - 1)
    for p in got.trained:
        d = np.abs(got.trained[p] - expected.trained[p])
        print(p, d.max(), d.mean(), np.mean(d > 1e-3))


def steps(
    decoder: Build,
    method: str,
    mesh_config: MeshConfig | None,
    microbatches: int = 1,
    *,
    dtype: str = "float32",
) -> Run:
    """Three steps on a mesh of all devices, or on the first device alone."""
    devices = jax.devices()[:1] if mesh_config is None else jax.devices()
    mesh = sharding.make_mesh(mesh_config or MeshConfig(), devices=devices)
    config = METHODS[method]
    model = decoder(**SIZES, dtype=dtype, remat="none")
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    params = add_adapters(params, config, layout=model.layout, key=jax.random.key(1))
    if config.train_whole:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    shardings = sharding.param_shardings(params, SHARDING_RULES, mesh=mesh)
    trained, frozen = partition(jax.device_put(params, shardings), whole=config.train_whole)
    tx = make_optimizer(OPTIM, steps=STEPS)
    places = unflatten({path: flatten(shardings)[path] for path in flatten(trained)})
    opt_places = sharding.state_shardings(tx, trained, places, mesh=mesh)
    state_places = TrainState(sharding.replicated(mesh), places, opt_places)
    state = TrainState(
        sharding.place(np.zeros((), np.int32), state_places.step),
        trained,
        jax.jit(tx.init, out_shardings=opt_places)(trained),
    )
    step = jax.jit(
        make_train_step(model, tx, packed=True),
        donate_argnums=0,
        out_shardings=(state_places, sharding.replicated(mesh)),
    )
    losses = []
    for i in range(STEPS):
        batch = sharding.place_batch(make_batch(i), mesh, microbatches=microbatches)
        state, metrics = step(state, frozen, batch, jax.random.key(2))
        losses.append(float(metrics["loss"]))
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(state.trained).items()}
    return Run(np.array(losses), leaves, state)


def check_places(state: TrainState) -> None:
    """Adapters lie as their kernels, the rank whole; moments as their parameters."""
    trained = flatten(state.trained)
    places = {path: leaf.sharding for path, leaf in trained.items()}
    mesh = next(iter(places.values())).mesh
    for path, place in places.items():
        module, name = path.rsplit("/", 1)
        base = path if name in ("kernel", "embedding", "scale") else f"{module}/kernel"
        axes = next(axes for rule, axes in SHARDING_RULES if re.fullmatch(rule, base))
        if base != path:
            _, ins, outs = axes
            axes = {"lora_a": (None, ins, None), "lora_b": (None, None, outs), "magnitude": (None, outs)}[name]
        assert place.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*axes)), trained[path].ndim), path
    moments = 0
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        path = next((p for p in places if path.endswith(p)), None)
        if path and leaf.ndim:
            assert leaf.sharding.is_equivalent_to(places[path], leaf.ndim), keys
            moments += 1
    assert moments == 2 * len(places)


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Random rows `[B, T]` of two samples each, with padding and different numbers of labels."""
    rng = np.random.default_rng(seed)
    cuts, ends = rng.integers(4, 8, (ROWS, 1)), rng.integers(10, TOKENS + 1, (ROWS, 1))
    slots = np.arange(TOKENS)[None]
    segments = np.where(slots < cuts, 1, np.where(slots < ends, 2, 0))
    tokens = rng.integers(0, SIZES["vocab_size"], (ROWS, TOKENS))
    return {
        "tokens": tokens.astype(np.int32),
        "targets": np.roll(tokens, -1, 1).astype(np.int32),
        "weights": ((segments > 0) & (rng.random((ROWS, TOKENS)) < 0.7)).astype(np.float32),
        "positions": np.where(slots < cuts, slots, slots - cuts).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
    }
