"""The papers' claims about first gradients and curvature, on SmolLM2-135M and GSM8K.

Run with -s to see the figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from run_cases import ROOT

from lorax_ft import (
    AdapterConfig,
    add_adapters,
    combine,
    load_config,
    partition,
    sharding,
    supervised_loss,
)
from lorax_ft.comparison.intervals import Interval, mean_interval
from lorax_ft.models.model import LoadedModel
from lorax_ft.run.inputs import load_base, load_dataset
from lorax_ft.run.setup import make_batches
from lorax_ft.sweep.axes import make_point
from lorax_ft.tree import Tree, flatten

SEEDS = (0, 1, 2)
RANKS = (2, 8, 32)
LENGTH = 160
"""Tokens of the batch, which is one packed row."""

Loss = Callable[[Tree, Tree], Array]


@pytest.fixture(scope="module")
def model_and_loss() -> tuple[LoadedModel, Loss]:
    """The model, and the mean loss of a batch by the trained and the frozen leaves."""
    path, data = os.environ.get("LORAX_FT_SMOLLM2"), os.environ.get("LORAX_FT_GSM8K")
    if not (path and data):
        pytest.skip(
            "set LORAX_FT_SMOLLM2 to a folder or .gguf file, "
            "and LORAX_FT_GSM8K to a folder with train.jsonl"
        )
    settings = {
        "model.path": path,
        "data.train": (str(Path(data) / "train.jsonl"),),
        "data.validation": (str(Path(data) / "test.jsonl"),),
        "data.max_length": LENGTH,
        "data.pack": True,
        "train.batch_size": 1,
    }
    config = make_point(load_config(ROOT / "configs/smollm2_gsm8k.py"), settings, number=0).config
    # Of the eight devices that tests have.
    mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:1])
    model = load_base(config, mesh)
    batch = make_batches(config, load_dataset(config, model)).batch(0)
    loss = supervised_loss(model, packed=True)

    def mean(trained: Tree, frozen: Tree) -> Array:
        total, weight, _ = loss(combine(trained, frozen), batch, jax.random.key(0))
        return total / weight

    return model, mean


def start(model: LoadedModel, seed: int, **values: Any) -> tuple[Tree, Tree]:
    """The trained and the frozen leaves of a fresh adapter."""
    config = AdapterConfig(**values)
    key = jax.random.key(seed)
    return partition(add_adapters(model.params, config, layout=model.layout, key=key))


def exponent(ranks: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log value against log rank."""
    slope, _ = np.polyfit(np.log(ranks), np.log(values), 1)
    return float(slope)


def norm_of_b(gradient: Tree) -> float:
    """The length of B's gradient over all layers."""
    leaves = flatten(gradient)
    of_b = [leaf for path, leaf in leaves.items() if path.endswith("lora_b")]
    assert of_b
    return float(optax.global_norm(of_b))


SCALINGS: dict[str, tuple[Callable[[int], dict[str, Any]], float, float]] = {
    "alpha / r": (lambda r: {"alpha": 16.0}, -0.5, 0.0),
    "alpha / √r": (lambda r: {"alpha": 16.0, "scaling": "rank_stabilized"}, 0.0, 0.5),
    "alpha in proportion to r": (lambda r: {"alpha": float(r)}, 0.5, 1.0),
}
"""Options by rank, and the exponents in r that are claimed: of ‖dB‖, and of the loss's drop."""


@pytest.mark.parametrize("name", SCALINGS)
def test_claim_17_exponents_of_the_first_step(name: str, model_and_loss: Any) -> None:
    """‖dB‖, and how far Adam's first step lowers the loss, as powers of the rank (2312.03732)."""
    model, loss = model_and_loss
    options, of_norm, of_drop = SCALINGS[name]
    tx = optax.adam(1e-5, eps=0.0)
    norms, drops = [], []
    for seed in SEEDS:
        found = []
        for rank in RANKS:
            trained, frozen = start(model, seed, rank=rank, **options(rank))
            before, gradient = jax.jit(jax.value_and_grad(loss))(trained, frozen)
            # Adam without eps divides A's first gradient, 0, by 0: only B moves.
            updates, _ = tx.update(gradient, tx.init(trained))
            updates = jax.tree.map(jnp.nan_to_num, updates)
            after = jax.jit(loss)(optax.apply_updates(trained, updates), frozen)
            found.append((norm_of_b(gradient), float(before - after)))
        norms.append(exponent(RANKS, [norm for norm, _ in found]))
        drops.append(exponent(RANKS, [drop for _, drop in found]))
    norm, drop = mean_interval(norms), mean_interval(drops)
    print(f"\n{name}: ‖dB‖ ~ r^({norm}), loss drop ~ r^({drop})")
    assert norm.mean == pytest.approx(of_norm, abs=0.1)
    assert drop.mean == pytest.approx(of_drop, abs=0.1)


def test_claim_18_pissa_starts_steeper_and_sharper(model_and_loss: Any) -> None:
    """The first gradient and the Hessian's largest eigenvalue of PiSSA, beside LoRA's."""
    model, loss = model_and_loss
    slopes, curvatures = [], []
    for seed in SEEDS:
        found = {}
        for init in ("kaiming", "pissa"):
            trained, frozen = start(model, seed, rank=8, alpha=8, init=init)
            gradient = jax.jit(jax.grad(loss))(trained, frozen)
            slope = float(optax.global_norm(gradient))
            found[init] = slope, sharpness(loss, trained, frozen, seed)
        slopes.append(found["pissa"][0] / found["kaiming"][0])
        curvatures.append(found["pissa"][1] / found["kaiming"][1])
    slope, curvature = mean_interval(slopes), mean_interval(curvatures)
    print(f"\nPiSSA / LoRA: gradient {slope}, sharpness {curvature}")
    assert above_one(slope)
    assert above_one(curvature)


def above_one(interval: Interval) -> bool:
    return interval.mean - interval.half_width > 1


def sharpness(loss: Loss, trained: Tree, frozen: Tree, seed: int, *, iterations: int = 8) -> float:
    """The Hessian's largest eigenvalue, by power iteration."""

    @jax.jit
    def multiply(vector: Tree, trained: Tree, frozen: Tree) -> tuple[Tree, Array]:
        _, product = jax.jvp(lambda leaves: jax.grad(loss)(leaves, frozen), (trained,), (vector,))
        size = optax.global_norm(product)
        return jax.tree.map(lambda leaf: leaf / size, product), size

    leaves, structure = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draws = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    vector = jax.tree.unflatten(structure, draws)
    length = optax.global_norm(vector)
    vector = jax.tree.map(lambda leaf: leaf / length, vector)
    size = jnp.zeros(())
    for _ in range(iterations):
        vector, size = multiply(vector, trained, frozen)
    return float(size)
