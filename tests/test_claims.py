"""What the papers claim, as far as a small machine can check it: one test a claim."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from lorax_ft import (
    AdapterConfig,
    OptimConfig,
    add_adapters,
    calibrate,
    combine,
    label,
    linear,
    make_optimizer,
    merge_adapters,
    merged_kernel,
    partition,
    with_norms,
)
from lorax_ft.interop.huggingface import decoder_config
from lorax_ft.lowrank.linear import column_norm
from lorax_ft.models.decoder import Decoder
from lorax_ft.models.model import Model
from lorax_ft.training.step import batch_loss
from lorax_ft.tree import Tree, flatten, modules

KEY = jax.random.key(11)

pytestmark = pytest.mark.usefixtures("strict")


def test_claim_1_a_fresh_adapter_is_the_base(zoo: Any) -> None:
    """LoRA (2106.09685), rsLoRA (2312.03732): bitwise; DoRA (2402.09353): to 1e-6."""
    case = zoo("decoder")
    base = case.plain(case.params)
    for fields in ({}, {"scaling": "rank_stabilized"}, {"dora": True}):
        config = AdapterConfig(rank=4, **fields)
        fresh = case.forward(add_adapters(case.params, config, layout=case.layout, key=KEY))
        if "dora" in fields:
            np.testing.assert_allclose(fresh, base, atol=1e-6)
        else:
            np.testing.assert_array_equal(fresh, base)


@pytest.mark.parametrize("alpha", [1.0, 4.0, 64.0])
@pytest.mark.parametrize("iterations", [None, 4])
def test_claim_2_pissas_residual_and_factors_make_up_the_base(zoo: Any, alpha: float, iterations: int | None) -> None:
    """W' + s A B = W for any alpha, to 5e-7 in float32 (2404.02948)."""
    case = zoo("decoder")
    config = AdapterConfig(rank=4, alpha=alpha, init="pissa", svd_iterations=iterations)
    params = add_adapters(case.params, config, layout=case.layout, key=KEY)
    base = modules(case.params)
    for path, layer in modules(params).items():
        if "lora_a" in layer:
            s, a, b = (np.float64(layer[name]) for name in ("lora_scale", "lora_a", "lora_b"))
            error = np.float64(layer["kernel"]) + s[:, None, None] * (a @ b) - np.float64(base[path]["kernel"])
            assert np.abs(error).max() < 5e-7
            assert distance(layer["kernel"], base[path]["kernel"]) > 0.05


@pytest.mark.parametrize("alpha", [1.0, 4.0, 64.0])
def test_claim_2_miloras_adapter_is_orthogonal_to_what_stays(zoo: Any, alpha: float) -> None:
    """W' + s A B = W for any alpha, relative to 5e-7, and A and B to W's principal subspace (2406.09044)."""
    case = zoo("decoder")
    params = add_adapters(case.params, AdapterConfig(rank=4, alpha=alpha, init="milora"), layout=case.layout, key=KEY)
    base = modules(case.params)
    for path, layer in modules(params).items():
        if "lora_a" in layer:
            s, a, b, left = (np.float64(layer[name]) for name in ("lora_scale", "lora_a", "lora_b", "kernel"))
            w = np.float64(base[path]["kernel"])
            assert np.abs(left + s[:, None, None] * (a @ b) - w).max() < 5e-7 * np.abs(w).max()
            u, sizes, vt = np.linalg.svd(w, full_matrices=False)
            assert np.abs(u[..., :-4].swapaxes(1, 2) @ a).max() < 1e-6 * np.abs(a).max()
            assert np.abs(b @ vt[..., :-4, :].swapaxes(1, 2)).max() < 1e-6 * np.abs(b).max()
            kept = np.linalg.norm(np.concatenate([sizes[..., :-4], 0 * sizes[..., -4:]], -1), axis=-1)
            np.testing.assert_allclose(np.linalg.norm(left, axis=(1, 2)), kept, rtol=1e-6)


@pytest.mark.parametrize("pattern", [(), ("layers/1/.*=2",)])
def test_an_orthogonal_start_is_the_base_and_both_factors_learn_at_once(zoo: Any, pattern: tuple[str, ...]) -> None:
    """A B = 0 in every matrix of a stack, at its own rank, with neither factor 0 (PEFT's "orthogonal")."""
    case = zoo("decoder")
    config = AdapterConfig(rank=4, init="orthogonal", rank_pattern=pattern)
    params = add_adapters(case.params, config, layout=case.layout, key=KEY)
    trained, frozen = partition(params)
    for layer in modules(params).values():
        if "lora_a" in layer:
            a, b = np.float64(layer["lora_a"]), np.float64(layer["lora_b"])
            assert np.abs(a @ b).max() < 1e-6 * np.abs(a).max() * np.abs(b).max()
            for i in range(3):
                rank = 2 if pattern and i == 1 else 4
                assert np.linalg.matrix_rank(a[i], tol=1e-5) == np.linalg.matrix_rank(b[i], tol=1e-5) == rank // 2
                assert [np.count_nonzero(a[i].any(0)), np.count_nonzero(b[i].any(1))] == [rank, rank]
            assert np.std(a) == pytest.approx(0.1 * np.sqrt(np.mean([4, 2 if pattern else 4, 4]) / 8), rel=0.2)
    g = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(case.apply({"params": combine(t, frozen)}, *case.example)))))(
        trained
    )
    for path, leaf in flatten(g).items():
        assert all(np.abs(matrix).max() > 0 for matrix in leaf), path
    with pytest.raises(ValueError, match=r"adapter.init orthogonal halves the rank, which is 3; give an even one"):
        AdapterConfig(rank=3, init="orthogonal")


def test_lora_fa_is_lora_without_a(zoo: Any) -> None:
    """B's first update is LoRA's bit for bit, A never moves, and has no gradient and no moments (2308.03303)."""
    case = zoo("decoder")
    params = add_adapters(case.params, AdapterConfig(rank=4), layout=case.layout, key=KEY)
    tx = make_optimizer(OptimConfig(learning_rate=1e-3, clip_norm=0), steps=3)

    def first(freeze: tuple[str, ...]) -> tuple[dict[str, Array], Any]:
        trained, frozen = partition(params, freeze=freeze)
        apply = lambda t: jnp.sum(jnp.sin(case.apply({"params": combine(t, frozen)}, *case.example)))  # noqa: E731
        with jax.numpy_dtype_promotion("standard"):  # optax adds an int32 count to a float (0.2.8)
            updates, state = jax.jit(tx.update)(jax.jit(jax.grad(apply))(trained), tx.init(trained), trained)
        return flatten(updates), state

    (both, full), (alone, half) = first(()), first(("lora_a",))
    assert {path.rpartition("/")[2] for path in alone} == {"lora_b"}
    for path, update in alone.items():
        np.testing.assert_array_equal(update, both[path])
        assert update.any()
    floats = [sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) for state in (full, half)]
    a, b = (sum(leaf.size for path, leaf in flatten(params).items() if path.endswith(name)) for name in ("_a", "_b"))
    assert floats == [2 * (a + b), 2 * b]
    owned, _ = partition(params, by="ownership", freeze=("lora_a",))
    assert {path.rpartition("/")[2] for path in flatten(owned)} == {"lora_a", "lora_b", "lora_scale"}


def test_lora_fa_keeps_no_input_for_the_backward_pass() -> None:
    """dB takes x A, of rank r; only dA takes x (2308.03303, section 3)."""
    layer = {"kernel": jnp.ones((64, 48)), "lora_a": jnp.ones((64, 2)), "lora_b": jnp.ones((2, 48))}
    layer |= {"lora_scale": jnp.float32(1)}

    def kept(*names: str) -> list[tuple[int, ...]]:
        """The shapes of what the backward pass is given that depends on x."""
        trained = {name: layer[name] for name in names}
        frozen = {name: leaf for name, leaf in layer.items() if name not in names}
        _, backward = jax.vjp(lambda t, x: linear(frozen | t, x, jnp.matmul), trained, jnp.ones((100, 64)))
        return [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.shape[:1] == (100,)]

    assert kept("lora_a", "lora_b").count((100, 64)) == 1
    assert kept("lora_b") == [(100, 2)]


def distance(got: Array, want: Array) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_claim_3_merged_equals_unmerged(zoo: Any, randomise: Any) -> None:
    """To 1e-5, and merging leaves the adapted parameters as they were, so that nothing needs restoring."""
    case = zoo("decoder")
    config = AdapterConfig(rank=4, init="pissa", dora=True, scaling="rank_stabilized")
    params = randomise(add_adapters(case.params, config, layout=case.layout, key=KEY))
    before = {path: np.array(leaf) for path, leaf in flatten(params).items()}
    merged = merge_adapters(params, layout=case.layout)
    assert distance(case.plain(merged), case.forward(params)) < 1e-5
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, before[path])


def test_claim_4_pissa_is_plain_lora_of_twice_the_rank(zoo: Any, randomise: Any) -> None:
    """W' + s A B = W + s [A, A₀] [B; −B₀], to 1e-6."""
    case = zoo("decoder")
    config = AdapterConfig(rank=4, alpha=6.0, init="pissa")
    params = randomise(add_adapters(case.params, config, layout=case.layout, key=KEY), size=0.05)
    plain = modules(case.params)
    for path, layer in modules(params).items():
        if "lora_a" in layer:
            plain[path] = plain[path] | {
                "lora_a": jnp.concatenate([layer["lora_a"], layer["lora_a0"]], axis=-1),
                "lora_b": jnp.concatenate([layer["lora_b"], -layer["lora_b0"]], axis=-2),
                "lora_scale": jnp.full(3, 2 * config.alpha / (2 * config.rank)),
            }
            want = np.asarray(merged_kernel(layer))
            np.testing.assert_allclose(merged_kernel(plain[path]), want, atol=1e-6 * np.abs(want).max())


def test_claim_5_the_first_gradients() -> None:
    """At B = 0, dA = 0 exactly and dB = s · (x A)ᵀ dy."""
    rng = np.random.default_rng(0)
    layer = {"kernel": rng.normal(size=(6, 5)), "lora_a": rng.normal(size=(6, 2)), "lora_b": np.zeros((2, 5))}
    layer = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in layer.items()} | {"lora_scale": jnp.float32(0.7)}
    x, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 6), (4, 5)))
    got = jax.grad(lambda la: jnp.sum(dy * linear(la, x, jnp.matmul)))(layer)
    np.testing.assert_array_equal(got["lora_a"], 0)
    np.testing.assert_allclose(got["lora_b"], 0.7 * (x @ layer["lora_a"]).T @ dy, rtol=1e-5)
    np.testing.assert_allclose(got["lora_b"], 0.7 * layer["lora_a"].T @ got["kernel"], rtol=1e-5, atol=1e-6)


def test_claim_6_detaching_doras_norm_leaves_the_magnitudes_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """dm is the same with the norm detached or not; dA and dB are not (2402.09353, section 4.3)."""
    rng = np.random.default_rng(1)
    shapes = {"kernel": (6, 5), "lora_a": (6, 2), "lora_b": (2, 5), "magnitude": (5,)}
    layer = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    layer |= {"lora_scale": jnp.float32(0.7)}
    x, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 6), (4, 5)))

    def gradient(*, detached: bool) -> Tree:
        def loss(layer: Tree) -> Array:
            whole = layer["kernel"] + layer["lora_scale"] * layer["lora_a"] @ layer["lora_b"]
            norm = column_norm(layer) if detached else jnp.linalg.norm(whole, axis=0)
            return jnp.sum(dy * linear(layer | {"norm": norm}, x, jnp.matmul))

        return jax.grad(loss)(layer)

    detached, attached = gradient(detached=True), gradient(detached=False)
    np.testing.assert_allclose(detached["magnitude"], attached["magnitude"], rtol=1e-5, atol=1e-6)
    assert distance(detached["lora_a"], attached["lora_a"]) > 0.01
    assert not jax.grad(lambda la: jnp.sum(column_norm(la)))(layer)["lora_b"].any()


@pytest.mark.parametrize(("removed", "tolerance"), [(0.0, 1e-6), (0.9, 2e-6), (0.99, 2e-5), (0.999, 2e-4)])
def test_claim_7_the_norm_where_the_adapter_nearly_cancels_the_kernel(removed: float, tolerance: float) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(64, 4)).astype(np.float32), rng.normal(size=(4, 48)).astype(np.float32)
    kernel = (np.float64(a) @ np.float64(b) + (1 - removed) * rng.normal(size=(64, 48))).astype(np.float32)
    layer = {"kernel": kernel, "lora_a": a, "lora_b": b, "lora_scale": np.float32(-1 if removed else 1)}
    dense = np.float64(kernel) + np.float64(layer["lora_scale"]) * (np.float64(a) @ np.float64(b))
    got = column_norm({name: jnp.asarray(leaf) for name, leaf in layer.items()})
    assert np.abs(got / np.linalg.norm(dense, axis=0) - 1).max() < tolerance


@pytest.mark.parametrize("dropout", [False, True])
def test_claim_7_a_gain_near_one_is_not_erased_in_bfloat16(dropout: bool) -> None:
    """m / n − 1 = 1e-3 is nothing in bfloat16 (its step at 1 is 8e-3), and all of the magnitude's first updates."""
    x = 1000 * jnp.ones((1, 4), jnp.bfloat16)
    layer = {"kernel": jnp.eye(4, dtype=jnp.bfloat16), "lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 4))}
    layer |= {"lora_scale": jnp.float32(1), "magnitude": jnp.full(4, 1 + 4e-3), "norm": jnp.ones(4)}
    layer |= {"dropout_key": KEY, "dropout_rate": jnp.float32(1e-6)} if dropout else {}
    assert np.float32(linear(layer, x, jnp.matmul)).max() == 1004  # bfloat16's step at 1000 is 4


def test_claim_8_counts_of_smollm2() -> None:
    """All linear layers: 305,280 · r low-rank parameters; DoRA adds 155,520."""
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = decoder_config({"model_type": "llama"} | sizes | heads, source="SmolLM2-135M")
    params = jax.eval_shape(Decoder(config).init, KEY, jnp.zeros((1, 2), jnp.int32))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    model = Model(config=config, params=params)
    for rank in (1, 8):
        adapter = AdapterConfig(rank=rank, dora=True)
        found = jax.eval_shape(lambda p, c=adapter: add_adapters(p, c, layout=model.layout, key=KEY), params)
        sizes: dict[str, int] = {}
        for path, leaf in flatten(partition(found)[0]).items():
            name = path.rpartition("/")[2]
            sizes[name] = sizes.get(name, 0) + leaf.size
        assert sizes["lora_a"] + sizes["lora_b"] == 305_280 * rank
        assert sizes["magnitude"] == 155_520


def test_claim_9_lora_plus(zoo: Any) -> None:
    """λ = 1 is LoRA bit for bit; Adam's first move of B is λ times that at the common rate (2402.12354)."""
    case = zoo("decoder")
    params = add_adapters(case.params, AdapterConfig(rank=2), layout=case.layout, key=KEY)
    trained, frozen = partition(params)

    @jax.jit
    def gradient(trained: Tree) -> Tree:
        return jax.grad(lambda t: jnp.sum(case.apply({"params": combine(t, frozen)}, *case.example) ** 2))(trained)

    def trajectory(tx: optax.GradientTransformation, steps: int) -> Tree:
        now, state, update = trained, tx.init(trained), jax.jit(tx.update)
        with jax.numpy_dtype_promotion("standard"):  # optax adds an int32 count to a float (0.2.8)
            for _ in range(steps):
                updates, state = update(gradient(now), state, now)
                now = optax.apply_updates(now, updates)
        return flatten(now)

    def lora_plus(ratio: float) -> optax.GradientTransformation:
        flat = {"learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0, "clip_norm": 0.0}
        return make_optimizer(OptimConfig(**flat, lora_plus_ratio=ratio), steps=10)

    plain, one = trajectory(optax.adamw(1e-3, weight_decay=0), 3), trajectory(lora_plus(1.0), 3)
    for path, leaf in plain.items():
        np.testing.assert_array_equal(leaf, one[path])
        assert not np.array_equal(leaf, flatten(trained)[path])
    first, sixteen = trajectory(lora_plus(1.0), 1), trajectory(lora_plus(16.0), 1)
    for path, leaf in first.items():
        if path.endswith("lora_b"):  # B starts at 0: where it is, is how far it moved
            np.testing.assert_allclose(sixteen[path], 16 * leaf, rtol=1e-6)
            assert leaf.any()


def test_claim_10_what_rates_and_scales_have_in_common() -> None:
    """With Adam (eps 0): alpha / (p q), A's start and rate · p, B's rate · q: the same trajectory."""
    p, q = 3.0, 0.25
    rng = np.random.default_rng(3)
    kernel, start, x, y = (rng.normal(size=shape) for shape in ((6, 5), (6, 2), (8, 6), (8, 5)))

    def losses(alpha: float, *, p: float, q: float) -> list[float]:
        fixed = {"kernel": jnp.asarray(kernel), "lora_scale": jnp.asarray(alpha / 2)}
        layer = {"lora_a": p * jnp.asarray(start), "lora_b": jnp.zeros((2, 5))}
        groups = {"lora_a": optax.adam(0.01 * p, eps=0), "lora_b": optax.adam(0.01 * q, eps=0)}
        tx = optax.multi_transform(groups, label(layer))

        @jax.jit
        def step(layer: Tree, state: Any, t: Array) -> tuple[Tree, Any, Array]:
            def loss(layer: Tree) -> Array:
                return jnp.mean((linear(fixed | layer, jnp.asarray(x), jnp.matmul) - jnp.asarray(y)) ** 2)

            value, g = jax.value_and_grad(loss)(layer)
            # A's first gradient is exactly 0, and Adam without eps divides 0 by 0
            g = jax.tree.map(lambda d: jnp.where((t == 0) & (d == 0), 1e-30, d), g)
            updates, state = tx.update(g, state)
            updates["lora_a"] = jnp.where(t == 0, 0, updates["lora_a"])
            return optax.apply_updates(layer, updates), state, value

        state, values = tx.init(layer), []
        for t in range(20):
            layer, state, value = step(layer, state, jnp.asarray(t))
            values.append(float(value))
        return values

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        one, other = losses(4.0, p=1, q=1), losses(4.0 / (p * q), p=p, q=q)
    assert one[-1] < 0.9 * one[0]
    np.testing.assert_allclose(one, other, rtol=1e-10)


def test_the_norm_is_computed_from_the_adapters_alone_and_never_stored(zoo: Any, randomise: Any) -> None:
    """Once a step, outside the microbatches: it does not depend on the batch, and no gradient flows into it."""
    case = zoo("decoder")
    params = randomise(add_adapters(case.params, AdapterConfig(rank=2, dora=True), layout=case.layout, key=KEY))
    trained, frozen = partition(params)

    def loss(trained: Tree, norms: bool) -> Array:
        whole = combine(trained, frozen)
        whole = with_norms(whole, layout=case.layout) if norms else whole
        return jnp.sum(jnp.sin(case.apply({"params": whole}, *case.example)))

    outside, inside = (flatten(jax.jit(jax.grad(loss), static_argnums=1)(trained, norms)) for norms in (True, False))
    for path in outside:
        assert distance(outside[path], inside[path]) < 1e-5, path


# -------------------- starts from data


def started(model: Model, batches: Any, **fields: Any) -> tuple[Tree, dict[str, np.ndarray]]:
    """The adapted layers by path, and what their start was measured as."""
    config = AdapterConfig(**({"rank": 4} | fields))
    statistics = calibrate(model, config, batches)
    params = add_adapters(model.params, config, layout=model.layout, key=KEY, statistics=statistics)
    return params, {path: np.float64(leaf) for path, leaf in statistics.items()}


def products(params: Tree) -> dict[str, np.ndarray]:
    """s A B of every module, float64."""
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
    """tr(Qᵀ C Q) with Q an orthonormal basis of A is the largest of all A; and ranks pay where they go (2410.07170)."""
    model, batches = decoder(), padded_batches(8)

    def explained(params: Tree) -> dict[str, np.ndarray]:
        shares = {}
        for path, c in covariances.items():
            bases = [np.linalg.svd(np.float64(a), full_matrices=False) for a in modules(params)[path]["lora_a"]]
            q = [u[:, s > 1e-6] for u, s, _ in bases]
            shares[path] = np.array([np.trace(m.T @ x @ m) / np.trace(x) for m, x in zip(q, c, strict=True)])
        return shares

    fixed, covariances = started(model, batches, init="eva", eva_rho=1.0)
    best = explained(fixed)
    for init in ("kaiming", "pissa", "olora"):
        other = explained(started(model, batches, init=init)[0])
        assert all((other[path] < best[path]).all() for path in best), init
    shares = {
        path: np.linalg.eigvalsh(c)[:, ::-1] / np.trace(c, axis1=1, axis2=2)[:, None] for path, c in covariances.items()
    }
    for path, share in shares.items():
        np.testing.assert_allclose(best[path], share[:, :4].sum(1), rtol=1e-5)
    spread, _ = started(model, batches, init="eva")
    pooled = np.sort(np.concatenate([share[:, :8].ravel() for share in shares.values()]))  # at most 2 r of a matrix
    total, before = (sum(float(share.sum()) for share in found.values()) for found in (explained(spread), best))
    assert abs(total - pooled[-4 * 3 * len(shares) :].sum()) < 1e-5 * total
    assert total > before
    ranks = [int((layer["lora_a"] != 0).any(1).sum()) for layer in modules(spread).values() if "lora_a" in layer]
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
        error = np.float64(modules(params)[path]["kernel"]) + change - np.float64(base[path]["kernel"])
        assert np.abs(error).max() < 2e-6


def test_corda_takes_what_the_data_needs_most_or_least(decoder: Any, padded_batches: Any) -> None:
    """IPM: no A B of rank r leaves less of C W. KPM: of what the layer answers to the data, A B holds the least."""
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
            np.linalg.norm(c @ (w - previewed), axis=(1, 2)), np.linalg.norm(tail, axis=1), rtol=1e-4
        )
        assert (
            np.linalg.norm(c @ (w - previewed), axis=(1, 2)) < np.linalg.norm(c @ (w - principal), axis=(1, 2))
        ).all()
        x = np.linalg.cholesky(c).swapaxes(1, 2)  # ‖x M‖ is ‖X M‖
        answers = [np.linalg.norm(x @ m, axis=(1, 2)) for m in (kept, principal, w)]
        assert (answers[0] < 0.5 * answers[1]).all()
        assert (answers[0] < 0.5 * answers[2]).all()


def test_lora_gas_first_step_is_the_gradients_best_of_twice_the_rank(decoder: Any, padded_batches: Any) -> None:
    """d(A B) = A dB + dA B ∝ the gradient's best approximation of rank 2 r; LoRA's is far from it (2407.05000)."""
    model, batches = decoder(), padded_batches(1, rows=8)
    batch = jax.tree.map(jnp.asarray, batches[0])
    ours, full = started(model, batches, init="lora_ga")
    for params, near in ((ours, True), (started(model, batches, init="kaiming")[0], False)):
        trained, frozen = partition(params)
        step = jax.grad(lambda t, f=frozen: batch_loss(model, combine(t, f), batch, packed=False))(trained)
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
    """s A B is −∂L/∂W's best of rank r, of norm s / γ, and the loss is smaller for it (2502.01235)."""
    model, batches = decoder(), padded_batches(1, rows=8)
    params, full = started(model, batches, init="lora_one", alpha=8.0)
    for path, change in products(params).items():
        u, s, vt = np.linalg.svd(-full[path], full_matrices=False)
        best = (u[:, :, :4] * s[:, None, :4]) @ vt[:, :4] / s[:, :1, None]
        np.testing.assert_allclose(change, 2 / 128 * best, atol=1e-6)
    batch = jax.tree.map(jnp.asarray, batches[0])
    before, after = (float(batch_loss(model, p, batch, packed=False)) for p in (model.params, params))
    assert after < 0.995 * before
