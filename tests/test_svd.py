"""The singular triples that inits use, exact and randomized."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import KEY, distance

from lorax_ft import AdapterConfig, add_adapters, merged_kernel
from lorax_ft.lowrank.highest import highest_matmul
from lorax_ft.lowrank.inits.context import InitContext
from lorax_ft.lowrank.inits.pissa import pissa
from lorax_ft.lowrank.inits.svd import exact, randomized, svd

pytestmark = pytest.mark.usefixtures("strict")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_the_exact_triples_equal_numpys_svd(shape: tuple[int, int], last: bool) -> None:
    w = np.random.default_rng(4).normal(size=(2, *shape)).astype(np.float32)
    a, b = exact(w, rank=5, last=last)
    u, s, vt = np.linalg.svd(np.float64(w), full_matrices=False)
    some = slice(None, -6, -1) if last else slice(5)
    want = np.einsum("lir,lr,lro->lio", u[..., some], s[:, some], vt[:, some])
    assert distance(a @ b, want) < 1e-6
    # Each factor takes √S.
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.sqrt(s[:, some]), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(b, axis=2), np.sqrt(s[:, some]), rtol=1e-6)


def test_the_last_triples_of_a_badly_conditioned_matrix() -> None:
    """From the Gram matrix alone, a singular value of 1e-6 of the largest has an error of 1e-4."""
    rng = np.random.default_rng(5)
    u, v = (np.linalg.qr(rng.normal(size=(n, 32)))[0] for n in (32, 48))
    w = ((u * np.logspace(0, -6, 32)) @ v.T).astype(np.float32)[None]
    a, b = exact(w, rank=4, last=True)
    s = np.linalg.svd(np.float64(w[0]), compute_uv=False)[:-5:-1]
    np.testing.assert_allclose(np.linalg.norm(a[0], axis=0) ** 2, s, rtol=1e-6)
    assert np.abs(np.float64(a[0] @ b[0])).max() < 2 * s[-1]


@pytest.mark.parametrize("iterations", [None, 4])
def test_pissa_of_a_matrix_of_lower_rank_is_finite(iterations: int | None) -> None:
    rng = np.random.default_rng(5)
    low = (rng.normal(size=(2, 20, 3)) @ rng.normal(size=(2, 3, 16))).astype(np.float32)
    for w in (low, np.zeros_like(low)):
        a, b = svd(jnp.asarray(w), rank=6, iterations=iterations, keys=jax.random.split(KEY, 2))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a @ b, w, atol=1e-5 * max(1, np.abs(w).max()))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_randomized_pissas_residual_is_within_a_percent(power: float) -> None:
    rng = np.random.default_rng(6)
    u, v = (np.linalg.qr(rng.normal(size=(n, 64)))[0] for n in (96, 64))
    w = ((u * np.arange(1.0, 65) ** -power) @ v.T).astype(np.float32)[None]
    a, b = exact(w, rank=8)
    ra, rb = randomized(jnp.asarray(w), KEY[None], rank=8, iterations=4)
    assert np.linalg.norm(w - ra @ rb) <= 1.01 * np.linalg.norm(w - a @ b)


def test_pissa_of_bfloat16_keeps_the_bases_type(decoder: Any) -> None:
    model = decoder(dtype="bfloat16", layers=1)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    config = AdapterConfig(rank=4, init="pissa", dora=True)
    layer = add_adapters(params, config, layout=model.layout, key=KEY)["layers"]["mlp"]["up_proj"]
    assert layer["kernel"].dtype == jnp.bfloat16
    assert {str(layer[name].dtype) for name in ("lora_a", "lora_b0", "magnitude")} == {"float32"}
    assert distance(merged_kernel(layer), params["layers"]["mlp"]["up_proj"]["kernel"]) < 1e-2


def test_qpissa_ends_on_the_decomposition() -> None:
    """A and B are the best of their rank for the base that they are trained on."""
    w = jax.random.normal(jax.random.key(0), (1, 24, 16))

    def start(rounds: int) -> tuple[float, float]:
        """‖W − Q − A B‖, and the same with what was taken out of Q in place of A B."""
        context = InitContext(
            kernel=w,
            rank=4,
            ranks=np.array([4]),
            scales=np.ones(1, np.float32),
            keys=jax.random.split(jax.random.key(1), 1),
            quantize=coarse,
            rounds=rounds,
        )
        factors, removed, _ = pissa(context)
        assert removed is not None
        left = w - coarse(w - highest_matmul(*removed))
        losses = [np.linalg.norm(left - highest_matmul(*pair)) for pair in (factors, removed)]
        best = np.linalg.svd(np.asarray(left[0]), compute_uv=False)[4:]
        assert rounds == 1 or losses[0] == pytest.approx(np.linalg.norm(best), rel=1e-4)
        return losses[0], losses[1]

    def coarse(w: jax.Array) -> jax.Array:
        return jnp.round(2 * w) / 2

    one, taken = start(1)
    assert one == taken
    fitted, taken = start(2)
    assert fitted < 0.99 * taken
