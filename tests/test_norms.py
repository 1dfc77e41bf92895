"""DoRA's norm, computed in advance, inside the layer or in blocks, equals the dense norm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import Adapted, distance

from lorax_ft import linear, merged_kernel, with_norms
from lorax_ft.lowrank.terms import magnitude as magnitude_module
from lorax_ft.lowrank.terms.magnitude import column_norm
from lorax_ft.tree import modules

pytestmark = pytest.mark.usefixtures("strict")


def test_a_magnitude_without_its_norm_raises() -> None:
    layer = {"kernel": jnp.ones((3, 2)), "magnitude": jnp.ones(2), "lora_scale": jnp.float32(1)}
    layer |= {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 2))}
    with pytest.raises(ValueError, match="with_norms"):
        linear(layer, jnp.ones((1, 3)), jnp.matmul)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("model", ["decoder", "vit_scanned", "convolutions", "einsums"])
def test_norms_computed_beforehand_equal_those_inside_the_layer(
    zoo: Any, adapted: Adapted, randomize: Any, model: str
) -> None:
    case = zoo(model)
    params = randomize(adapted(model, "pissa-rank_stabilized-dora"))
    normed = with_norms(params, layout=case.layout)
    for path, layer in modules(normed).items():
        assert ("magnitude" in layer) == ("norm" in layer), path
        assert "norm" not in layer or layer["norm"].shape == layer["magnitude"].shape
    assert distance(case.forward(normed), case.forward(params)) < 1e-6


def test_the_norm_of_a_pissa_start_is_that_of_the_original_kernel(
    zoo: Any, adapted: Adapted
) -> None:
    kernel = zoo("decoder").params["layers"]["mlp"]["up_proj"]["kernel"]
    for method in ("kaiming", "pissa", "pissa_kept", "pissa_randomized"):
        magnitude = adapted("decoder", f"{method}-rank_stabilized-dora")["layers"]["mlp"][
            "up_proj"
        ]["magnitude"]
        assert distance(magnitude, np.linalg.norm(np.float64(kernel), axis=1)) < 1e-6


def test_a_column_of_zeros_has_gain_zero() -> None:
    layer = {
        "kernel": jnp.zeros((4, 3)).at[:, 1].set(1),
        "lora_a": jnp.ones((4, 2)),
        "lora_b": jnp.zeros((2, 3)),
    }
    layer |= {"lora_scale": jnp.float32(1), "magnitude": jnp.array([0.0, 2.0, 1.0])}
    layer["norm"] = column_norm(layer)
    np.testing.assert_array_equal(layer["norm"], [0, 2, 0])
    np.testing.assert_array_equal(linear(layer, jnp.ones((1, 4)), jnp.matmul), [[0, 4, 0]])
    np.testing.assert_array_equal(merged_kernel(layer)[:, 1], 1)
    g = jax.grad(lambda la: jnp.sum(linear(la, jnp.ones((1, 4)), jnp.matmul)))(layer)
    assert all(np.isfinite(leaf).all() for leaf in g.values())


@pytest.mark.parametrize("stack", [(), (3,), (1,)])
@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("rows", [12, 13])
def test_the_norm_by_blocks_equals_the_dense_one(
    monkeypatch: pytest.MonkeyPatch, stack: tuple[int, ...], block: int, rows: int
) -> None:
    monkeypatch.setattr(magnitude_module, "NORM_BLOCK", block)
    rng = np.random.default_rng(3)
    full = {
        "kernel": rng.normal(size=(*stack, rows, 2, 5)),
        "lora_a": rng.normal(size=(*stack, rows, 3)),
        "lora_b": rng.normal(size=(*stack, 3, 2, 5)),
        "lora_a0": rng.normal(size=(*stack, rows, 3)),
        "lora_b0": rng.normal(size=(*stack, 3, 2, 5)),
        "lora_scale": rng.normal(size=stack),
        "start_scale": rng.normal(size=stack),
    }
    a, b = (
        np.einsum("...,...ir,...rjk->...ijk", full["lora_scale"], full["lora_a"], full["lora_b"]),
        full["start_scale"],
    )
    dense = (
        full["kernel"]
        + a
        - np.einsum("...,...ir,...rjk->...ijk", b, full["lora_a0"], full["lora_b0"])
    )
    want = np.linalg.norm(dense, axis=len(stack))
    got = column_norm(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), full))
    assert got.shape == want.shape
    assert distance(got, want) < 1e-6


@pytest.mark.parametrize(("stack", "matrices"), [((), 0.25), ((8,), 1.1)])
def test_the_norm_makes_no_full_size_temporary(
    monkeypatch: pytest.MonkeyPatch, stack: tuple[int, ...], matrices: float
) -> None:
    monkeypatch.setattr(magnitude_module, "NORM_BLOCK", 2**14)
    shapes = {"kernel": (512, 1024), "lora_a": (512, 4), "lora_b": (4, 1024), "lora_scale": ()}
    layer = {
        name: jax.ShapeDtypeStruct((*stack, *shape), jnp.float32) for name, shape in shapes.items()
    }
    compiled = jax.jit(column_norm).lower(layer).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < matrices * 4 * 512 * 1024
