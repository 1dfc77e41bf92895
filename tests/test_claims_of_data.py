"""The papers' claims about data-driven initialization, one test per claim."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_ft import AdapterConfig, add_adapters, calibrate, combine, partition
from lorax_ft.models.model import Model
from lorax_ft.training.losses import batch_loss
from lorax_ft.tree import Tree, modules

KEY = jax.random.key(11)

pytestmark = pytest.mark.usefixtures("strict")


def started(model: Model, batches: Any, **fields: Any) -> tuple[Tree, dict[str, np.ndarray]]:
    """The adapted layers by path, and the statistics that initialized them."""
    config = AdapterConfig(**({"rank": 4} | fields))
    statistics = calibrate(model, config, batches)
    params = add_adapters(model.params, config, layout=model.layout, key=KEY, statistics=statistics)
    return params, {path: np.float64(leaf) for path, leaf in statistics.items()}


def products(params: Tree) -> dict[str, np.ndarray]:
    """s A B of every module in float64."""
    found = {}
    for path, layer in modules(params).items():
        if "lora_a" in layer:
            s, a, b = (np.float64(layer[name]) for name in ("lora_scale", "lora_a", "lora_b"))
            found[path] = s[:, None, None] * (a @ b)
    return found


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the matrices of two stacks."""
    return np.sum(x * y, (1, 2)) / np.linalg.norm(x, axis=(1, 2)) / np.linalg.norm(y, axis=(1, 2))


def test_eva_explains_the_most_variance_for_its_ranks(decoder: Any, padded_batches: Any) -> None:
    """EVA (2410.07170): A maximizes tr(Qᵀ C Q), with Q an orthonormal basis of A.

    Ranks go to the directions that explain the most variance.
    """
    model, batches = decoder(), padded_batches(8)

    def explained(params: Tree) -> dict[str, np.ndarray]:
        shares = {}
        for path, c in covariances.items():
            bases = [
                np.linalg.svd(np.float64(a), full_matrices=False)
                for a in modules(params)[path]["lora_a"]
            ]
            q = [u[:, s > 1e-6] for u, s, _ in bases]
            shares[path] = np.array(
                [np.trace(m.T @ x @ m) / np.trace(x) for m, x in zip(q, c, strict=True)]
            )
        return shares

    fixed, covariances = started(model, batches, init="eva", eva_rho=1.0)
    best = explained(fixed)
    for init in ("kaiming", "pissa", "olora"):
        other = explained(started(model, batches, init=init)[0])
        assert all((other[path] < best[path]).all() for path in best), init
    shares = {
        path: np.linalg.eigvalsh(c)[:, ::-1] / np.trace(c, axis1=1, axis2=2)[:, None]
        for path, c in covariances.items()
    }
    for path, share in shares.items():
        np.testing.assert_allclose(best[path], share[:, :4].sum(1), rtol=1e-5)
    spread, _ = started(model, batches, init="eva")
    # At most 2 r directions per matrix.
    pooled = np.sort(np.concatenate([share[:, :8].ravel() for share in shares.values()]))
    total, before = (
        sum(float(share.sum()) for share in found.values()) for found in (explained(spread), best)
    )
    assert abs(total - pooled[-4 * 3 * len(shares) :].sum()) < 1e-5 * total
    assert total > before
    ranks = [
        int((layer["lora_a"] != 0).any(1).sum())
        for layer in modules(spread).values()
        if "lora_a" in layer
    ]
    assert sum(ranks) == 4 * 3 * len(covariances)


@pytest.mark.parametrize("alpha", [1.0, 4.0, 64.0])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_cordas_residual_and_factors_make_up_the_base(
    decoder: Any, padded_batches: Any, mode: str, alpha: float
) -> None:
    """W' + s A B = W for any alpha (2406.05223)."""
    model = decoder()
    params, _ = started(model, padded_batches(), init="corda", corda_mode=mode, alpha=alpha)
    base = modules(model.params)
    for path, change in products(params).items():
        error = (
            np.float64(modules(params)[path]["kernel"]) + change - np.float64(base[path]["kernel"])
        )
        assert np.abs(error).max() < 2e-6


def test_corda_takes_what_the_data_needs_most_or_least(decoder: Any, padded_batches: Any) -> None:
    """IPM: A B is the best approximation of C W of rank r.

    KPM: A B holds the least of the layer's output on the data.
    """
    model, batches = decoder(), padded_batches(8)
    first, moments = started(model, batches, init="corda", corda_mode="ipm")
    last, _ = started(model, batches, init="corda", corda_mode="kpm")
    top, _ = started(model, batches, init="pissa")
    base = modules(model.params)
    for path, c in moments.items():
        w, n = np.float64(base[path]["kernel"]), c.shape[-1]
        c = c * (n / np.trace(c, axis1=1, axis2=2))[:, None, None] + 0.01 * np.eye(n)
        previewed, kept, principal = (products(params)[path] for params in (first, last, top))
        tail = np.linalg.svd(c @ w, compute_uv=False)[:, 4:]
        np.testing.assert_allclose(
            np.linalg.norm(c @ (w - previewed), axis=(1, 2)),
            np.linalg.norm(tail, axis=1),
            rtol=1e-4,
        )
        assert (
            np.linalg.norm(c @ (w - previewed), axis=(1, 2))
            < np.linalg.norm(c @ (w - principal), axis=(1, 2))
        ).all()
        x = np.linalg.cholesky(c).swapaxes(1, 2)  # ‖x M‖ is ‖X M‖
        answers = [np.linalg.norm(x @ m, axis=(1, 2)) for m in (kept, principal, w)]
        assert (answers[0] < 0.5 * answers[1]).all()
        assert (answers[0] < 0.5 * answers[2]).all()


def test_lora_gas_first_step_is_the_gradients_best_of_twice_the_rank(
    decoder: Any, padded_batches: Any
) -> None:
    """d(A B) = A dB + dA B ∝ the best approximation of the gradient of rank 2 r (2407.05000).

    That of plain LoRA is far from it.
    """
    model, batches = decoder(), padded_batches(1, rows=8)
    batch = jax.tree.map(jnp.asarray, batches[0])
    ours, full = started(model, batches, init="lora_ga")
    for params, near in ((ours, True), (started(model, batches, init="kaiming")[0], False)):
        trained, frozen = partition(params)
        step = jax.grad(lambda t, f=frozen: batch_loss(model, combine(t, f), batch, packed=False))(
            trained
        )
        for path, layer in modules(step).items():
            a, b = (np.float64(modules(params)[path][name]) for name in ("lora_a", "lora_b"))
            moved = a @ np.float64(layer["lora_b"]) + np.float64(layer["lora_a"]) @ b
            squares = np.linalg.svd(full[path], compute_uv=False) ** 2
            best = np.sqrt(squares[:, :8].sum(1) / squares.sum(1))
            if near:
                np.testing.assert_allclose(cosine(moved, full[path]), best, rtol=1e-3)
            else:
                assert (cosine(moved, full[path]) < 0.8 * best).all()


def test_lora_one_starts_a_step_down_the_gradient(decoder: Any, padded_batches: Any) -> None:
    """s A B is the best rank-r approximation of −∂L/∂W, of norm s / γ, and lowers the loss.

    LoRA-One (2502.01235).
    """
    model, batches = decoder(), padded_batches(1, rows=8)
    params, full = started(model, batches, init="lora_one", alpha=8.0)
    for path, change in products(params).items():
        u, s, vt = np.linalg.svd(-full[path], full_matrices=False)
        best = (u[:, :, :4] * s[:, None, :4]) @ vt[:, :4] / s[:, :1, None]
        np.testing.assert_allclose(change, 2 / 128 * best, atol=1e-6)
    batch = jax.tree.map(jnp.asarray, batches[0])
    before, after = (
        float(batch_loss(model, p, batch, packed=False)) for p in (model.params, params)
    )
    assert after < 0.995 * before
